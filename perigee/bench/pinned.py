"""A cluster on this machine whose workers have one thread and one core each, so that none disturbs another."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from perigee.bench.errors import BenchError

_GRACE_S = 30.0


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """Where its API is."""

    url: str


@contextlib.asynccontextmanager
async def running(model: str, flags: Sequence[str], log: Path) -> AsyncIterator[RunningCluster]:
    """`perigee up` on a free port, as a process, ended afterwards. Raises BenchError if it does not come up."""
    arguments = ("up", f"--model={model}", "--port=0", "--threads=1", *flags)
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "perigee", *arguments, stdout=asyncio.subprocess.PIPE, stderr=stderr
        )
    try:
        assert process.stdout is not None
        said = (await process.stdout.readline()).decode()
        if not said.startswith("ready: "):
            raise BenchError(f"model: the cluster for {model!r} did not start: {_last_line(log)}")
        yield RunningCluster(said.removeprefix("ready: ").strip())
    finally:
        await _end(process)


def pin(pids: Sequence[int]) -> bool:
    """Gives each of these processes a core of its own, its threads included, as far as there are cores. Returns whether
    there were enough."""
    cores = sorted(os.sched_getaffinity(0))
    for index, pid in enumerate(pids):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # threads come and go
                os.sched_setaffinity(int(thread.name), {cores[index % len(cores)]})
    return len(pids) <= len(cores)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(_GRACE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return lines[-1] if lines else "it said nothing"
