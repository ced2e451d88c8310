"""A cluster whose processes are started one by one, so that one of them can die while the others live on."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from perigee.supervisor import ChildSpec
from perigee.up import UpConfig, plan
from tests.e2e.endpoint import PATIENCE_S


@dataclass(slots=True)
class Parts:
    """Processes by name, like `decode-0`. What they say goes to `log`."""

    specs: dict[str, ChildSpec]
    log: Path
    environment: Mapping[str, str]
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
                env={**os.environ, **self.environment, **spec.environment},
            )

    def restore(self) -> None:
        """Starts again what was killed or has ended."""
        for name in self.specs:
            if name in self.running and self.running[name].poll() is not None:
                self.start(name)

    def kill(self, name: str) -> None:
        """As `kill -9` does: the process can say nothing to anybody."""
        self.running[name].kill()
        self.running[name].wait()

    def end(self) -> None:
        """Ends all that runs, the last one first."""
        for process in reversed(self.running.values()):
            process.terminate()
            process.wait()


@contextmanager
def parts(config: UpConfig, directory: Path, without: Collection[str] = ()) -> Iterator[Parts]:
    """The processes that `perigee up` would start for `config`, but those in `without`, with their sockets in
    `directory`. All are ended afterwards.
    """
    specs = plan(config, config.port, Path(config.model), directory, [])
    environment = {"PERIGEE_WORKER_DRAIN_S": str(PATIENCE_S)}
    if config.cluster_secret:
        environment["PERIGEE_CLUSTER_SECRET"] = config.cluster_secret.get_secret_value()
    started = Parts({spec.name: spec for spec in specs}, directory / "log", environment)
    try:
        for name in started.specs:
            if name not in without:
                started.start(name)
        yield started
    finally:
        started.end()


def free_port() -> int:
    """A port that nobody listens on, just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_healthy(url: str, started: Parts) -> None:
    """Returns once the API answers. Raises AssertionError if a process ended instead."""
    deadline = time.monotonic() + PATIENCE_S
    while not _is_healthy(url):
        dead = [name for name, process in started.running.items() if process.poll() is not None]
        assert not dead, f"{dead} ended:\n{started.log.read_text()}"
        assert time.monotonic() < deadline, started.log.read_text()
        time.sleep(0.1)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=PATIENCE_S) as response:
            return int(response.status) == 200
    except OSError:
        return False
