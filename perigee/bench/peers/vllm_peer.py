"""vLLM's CPU engine as a peer."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from perigee.bench.peers import vllm_child
from perigee.bench.peers.base import common, run_peer
from perigee.bench.workload import DECODE_PROMPT_TOKENS, DecodeTime, Figures, Job, decode_tokens


class Vllm:
    """vLLM in a virtual environment of its own, whose `python` it is."""

    name = "vllm"

    def __init__(self, job: Job, vocab_size: int, python: Path) -> None:
        self._job = job
        self._vocab_size = vocab_size
        self._python = python

    def measure(self) -> Figures:
        cores = sorted(os.sched_getaffinity(0))[: self._job.threads]
        job = {
            **common(self._job),
            "cores": ",".join(map(str, cores)),
            "vocab_size": self._vocab_size,
            "sizes": self._runs(),
        }
        output = run_peer(self.name, [str(self._python), str(Path(vllm_child.__file__)), json.dumps(job)])
        return self._figures(json.loads(output.splitlines()[-1]))

    def _runs(self) -> list[tuple[int, int, int]]:
        """Sequences, prompt tokens and new tokens of each."""
        sizes = self._job.sizes
        prompts = [(1, n, 1) for n in sizes.prefill]
        return prompts + [(n, DECODE_PROMPT_TOKENS, new) for n in sizes.decode for new in (1, decode_tokens(n))]

    def _figures(self, times: Sequence[tuple[int, int, int, float]]) -> Figures:
        seconds = {(sequences, prompt, new): s for sequences, prompt, new, s in times}
        prefill = {n: seconds[1, n, 1] for n in self._job.sizes.prefill}
        return Figures.of_times(prefill, {n: _vllm_decode(seconds, n) for n in self._job.sizes.decode})


def _vllm_decode(seconds: Mapping[tuple[int, int, int], float], streams: int) -> DecodeTime:
    new = decode_tokens(streams)
    prompts_s = seconds[streams, DECODE_PROMPT_TOKENS, 1]
    return DecodeTime(prompts_s, seconds[streams, DECODE_PROMPT_TOKENS, new] - prompts_s, streams * (new - 1))
