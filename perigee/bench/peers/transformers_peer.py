"""Hugging Face transformers as a peer."""

import importlib.util
import json
import sys

from perigee.bench.peers.base import common, run_peer
from perigee.bench.workload import Figures, Job


class Transformers:
    """Hugging Face transformers, as it is installed beside Perigee."""

    name = "transformers"

    def __init__(self, job: Job) -> None:
        self._job = job

    @staticmethod
    def is_installed() -> bool:
        return importlib.util.find_spec("transformers") is not None

    def measure(self) -> Figures:
        sizes = self._job.sizes
        job = {**common(self._job), "prefill": sizes.prefill, "decode": sizes.decode}
        output = run_peer(self.name, [sys.executable, "-m", "perigee.bench.peers.transformers_child", json.dumps(job)])
        return Figures.from_json(json.loads(output.splitlines()[-1]))
