"""Child processes that live and end together, and the private directory for their sockets."""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

logger = logging.getLogger(__name__)

_PREFIX = "perigee-up-"
# A run directory is locked right after it is made; one that is younger may be just between the two.
_UNLOCKED_AGE_S = 60.0
# gRPC tells of every connection that a process closes as it ends.
_QUIET = {"GRPC_VERBOSITY": "ERROR"}


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A process to be: `perigee` with `arguments`, and what its environment has beyond ours.

    Those of a higher `tier` need those of the lower ones, and so end before them.
    """

    name: str
    tier: int
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Death:
    """A child that ended. `code` is its exit code, or minus the number of the signal that killed it."""

    name: str
    code: int

    def __str__(self) -> str:
        if self.code < 0:
            return f"{self.name} was killed by {signal.Signals(-self.code).name}"
        return f"{self.name} ended with exit code {self.code}"


class Children:
    """Starts processes and, as an async context manager, ends what it started, tier by tier. All have `environment`.

    They are in sessions of their own, so a terminal's Ctrl-C reaches them only through us. Should we be killed, the
    lifeline ends them.
    """

    def __init__(self, run_directory: Path, grace_s: float, environment: Mapping[str, str]) -> None:
        self._run_directory = run_directory
        # What libraries leave in the temporary directory goes with ours.
        self._environment = {**_QUIET, **os.environ, "TMPDIR": str(run_directory), **environment}
        self._grace_s = grace_s
        self._lifeline, self._held = os.pipe()  # reading end for the children, writing end for us alone
        self._children: list[_Child] = []

    async def __aenter__(self) -> "Children":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._end()
        finally:
            os.close(self._held)
            os.close(self._lifeline)

    async def start(self, spec: ChildSpec) -> None:
        """Starts a child. What it prints goes to our standard error, for our standard output is not its to use."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "perigee", *spec.arguments),
            *(f"--lifeline={self._lifeline}", f"--run-directory={self._run_directory}"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            env={**self._environment, **spec.environment},
            pass_fds=(self._lifeline,),
            start_new_session=True,
        )
        self._children.append(_Child(spec, process))
        logger.info("child started name=%s pid=%d", spec.name, process.pid)

    async def first_death(self) -> Death:
        """Waits until one of the children ends."""
        waits = {asyncio.create_task(child.death()) for child in self._children}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for wait in waits:
                wait.cancel()

    async def _end(self) -> None:
        """Asks all to end, and kills what has not ended in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace_s):
                for tier in sorted({child.spec.tier for child in self._children}, reverse=True):
                    await self._end_tier(tier)
        for child in self._children:
            if child.process.returncode is None:
                logger.warning("child killed name=%s grace_s=%s", child.spec.name, self._grace_s)
                child.signal(signal.SIGKILL)
                await child.death()

    async def _end_tier(self, tier: int) -> None:
        children = [child for child in self._children if child.spec.tier == tier]
        for child in children:
            child.signal(signal.SIGTERM)
        for child in children:
            logger.info("child ended name=%s code=%d", child.spec.name, (await child.death()).code)


@dataclass(frozen=True, slots=True)
class _Child:
    spec: ChildSpec
    process: asyncio.subprocess.Process

    async def death(self) -> Death:
        return Death(self.spec.name, await self.process.wait())

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            self.process.send_signal(number)


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """A directory of this run alone, gone afterwards. Removes those of runs that could not remove their own."""
    _remove_abandoned()
    path = Path(tempfile.mkdtemp(prefix=_PREFIX))
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # dropped by the kernel when this process ends
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def _remove_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # Those that are not ours, or are just going, cannot be opened or removed, and need not be.
        with contextlib.suppress(OSError):
            if _is_abandoned(path):
                shutil.rmtree(path)
                logger.info("abandoned run directory removed path=%s", path)


def _is_abandoned(path: Path) -> bool:
    status = path.lstat()
    if status.st_uid != os.getuid() or time.time() - status.st_mtime < _UNLOCKED_AGE_S:
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
