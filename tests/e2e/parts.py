"""A cluster whose processes are started one by one, so that one of them can die while the others live on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from perigee.supervisor import ChildSpec
from perigee.up import UpConfig, plan


@dataclass(slots=True)
class Parts:
    """Processes by name, like `decode-0`. What they say goes to `log`."""

    specs: dict[str, ChildSpec]
    log: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Starts what has not been started, or was killed."""
        spec = self.specs[name]
        with self.log.open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "perigee", *spec.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **spec.environment},
            )

    def kill(self, name: str) -> None:
        """As `kill -9` does: the process can say nothing to anybody."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def end(self) -> None:
        """Ends all that runs, the last one first."""
        for process in reversed(self.running.values()):
            process.terminate()
            process.wait()


@contextmanager
def parts(config: UpConfig, directory: Path) -> Iterator[Parts]:
    """The processes that `perigee up` would start for `config`, with their sockets in `directory`, ended afterwards."""
    specs = plan(config, config.port, Path(config.model), directory, [])
    started = Parts({spec.name: spec for spec in specs}, directory / "log")
    try:
        for name in started.specs:
            started.start(name)
        yield started
    finally:
        started.end()
