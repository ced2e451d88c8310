"""Starts `perigee up` as users do, as a process, for tests from end to end."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Cluster:
    """A `perigee up` that runs. `log` is what it and its children say on standard error."""

    process: subprocess.Popen[str]
    temporary: Path
    log: Path

    def wait_ready(self) -> str:
        """The URL of the API, once it answers. Raises AssertionError with the log if the cluster ends instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.fullmatch(r"ready: (http://\S+)\n", line)
        assert match, f"said {line!r} instead of being ready:\n{self.log.read_text()}"
        return match[1]

    def children(self) -> dict[str, psutil.Process]:
        """The processes of the cluster by name, like `decode-0`. They are there long before the API is."""
        return {_name(child): child for child in psutil.Process(self.process.pid).children()}

    def end(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Sends a signal to the supervisor, waits for its end, and returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


@contextmanager
def cluster(temporary: Path, *arguments: str) -> Iterator[Cluster]:
    """`perigee up` on a free port with `arguments`, ended afterwards. Its files go under `temporary`, which exists.

    Does not wait for the API: `wait_ready` does.
    """
    descriptor, log = tempfile.mkstemp(suffix=".log", dir=temporary)
    with os.fdopen(descriptor, "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "perigee", "up", "--port=0", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
    with process:  # closes its standard output, and waits
        try:
            yield Cluster(process, temporary, Path(log))
        finally:
            process.terminate()


def _name(process: psutil.Process) -> str:
    words = process.cmdline()
    named = [word.removeprefix("--id=") for word in words if word.startswith("--id=")]
    return named[0] if named else words[words.index("perigee") + 1]
