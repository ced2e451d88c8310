"""What is asked of a peer, and how its process is run."""

import subprocess
from collections.abc import Sequence
from typing import Protocol

from perigee.bench.errors import PeerFailed
from perigee.bench.workload import Figures, Job

# What is kept of a failed peer's standard error.
ERROR_LINES = 15


class Peer(Protocol):
    """An engine that is not ours."""

    @property
    def name(self) -> str: ...

    def measure(self) -> Figures:
        """One round. Raises PeerFailed."""
        ...


def run_peer(name: str, command: Sequence[str]) -> str:
    """Runs a peer's process to its end: its standard output. Raises PeerFailed."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise PeerFailed(f"{name}: {command[0]}: {error.strerror}") from error
    if ended.returncode or not ended.stdout.strip():
        last = "\n".join(ended.stderr.splitlines()[-ERROR_LINES:])
        raise PeerFailed(f"{name}: ended with exit code {ended.returncode}:\n{last}")
    return ended.stdout


def common(job: Job) -> dict[str, str | int]:
    """What every child is told."""
    return {"model": str(job.directory), "dtype": job.dtype, "threads": job.threads}
