"""Event logs as files: gzip of the lines of `eventlog`, so that `zcat` shows them.

Each flush is a gzip member of its own. What was flushed outlives a kill of the process, and the whole lines of a
member that was cut off count as well.
"""

import asyncio
import gzip
import logging
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from perigee.scheduler.commands import Command
from perigee.scheduler.errors import InvalidRecording, SchedulerError
from perigee.scheduler.events import Event
from perigee.scheduler.recording.eventlog import Header, LogEncoder

_log = logging.getLogger(__name__)

_FLUSH_S = 0.5
_COMPRESSION = 3  # keys do not compress, and the rest does so well at once
_READ_BYTES = 1 << 20

# What a disk that hangs may make us hold.
_MAX_WAITING_CHARS = 64 << 20


class Recorder:
    """Writes one recording. Lines are made as events come; packing and writing them is another thread's work.

    A recording has no holes: when the file has `max_bytes`, or cannot be written, it ends there and serving goes on.
    """

    def __init__(self, path: Path, header: Header, max_bytes: int) -> None:
        """A file that is there already is kept as `path` with `.1` at its end. Raises SchedulerError."""
        self._path = path
        self._max_bytes = max_bytes
        self._encoder = LogEncoder()
        self._lines = deque([self._encoder.header(header)])  # `take` fills it, `flush` empties it
        self._taken_chars = 0  # counted by `take`
        self._written_chars = 0  # counted by `flush`, as is the next
        self._num_bytes = 0
        self._ended = False
        self._writing = threading.Lock()  # `close` may come while another thread is at it
        try:
            if path.is_file():
                path.replace(path.with_name(path.name + ".1"))
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise SchedulerError(f"record: {str(path)!r} cannot be written: {error.strerror}") from error
        _log.info("recording started file=%s", path)

    def take(self, event: Event, now: float, commands: Sequence[Command]) -> None:
        """One more event, and the answer to it."""
        if self._ended:
            return
        line = self._encoder.record(event, now, commands)
        self._lines.append(line)
        self._taken_chars += len(line)
        if self._taken_chars - self._written_chars > _MAX_WAITING_CHARS:
            self._end("the disk is too slow")

    async def run(self) -> None:
        """Writes what was taken, until cancelled."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            await asyncio.to_thread(self.flush)

    def close(self) -> None:
        """Writes the rest."""
        self.flush()
        self._end("closed")
        self._file.close()

    def flush(self) -> None:
        """Writes what waits. Any thread may."""
        with self._writing:
            text = "".join([self._lines.popleft() for _ in range(len(self._lines))])
            if self._ended or not text:
                return
            try:
                self._append(gzip.compress(text.encode(), _COMPRESSION))
            except OSError as error:
                self._end(f"cannot be written: {error.strerror}")
            self._written_chars += len(text)

    def _append(self, member: bytes) -> None:
        if self._num_bytes + len(member) > self._max_bytes:
            self._end(f"it has the {self._max_bytes} bytes that are allowed")
            return
        rest = memoryview(member)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._num_bytes += len(member)

    def _end(self, reason: str) -> None:
        if not self._ended:
            self._ended = True
            _log.info("recording ended file=%s bytes=%d reason=%s", self._path, self._num_bytes, reason)


def read_lines(path: Path) -> Iterator[str]:
    """The whole lines of a recording, up to where it was cut off, if it was. Raises InvalidRecording."""
    rest = b""
    try:
        for data in _members(path):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line.decode()
    except OSError as error:
        raise InvalidRecording(f"{path}: cannot be read: {error.strerror}") from error
    except (zlib.error, UnicodeDecodeError) as error:
        raise InvalidRecording(f"{path}: is damaged, or no recording: {error}") from error


def _members(path: Path) -> Iterator[bytes]:
    """What gzip members hold, the last of which may lack its end. Each has a checksum, which zlib holds it against."""
    unpacker = zlib.decompressobj(wbits=31)
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            while data:
                if unpacker.eof:
                    unpacker = zlib.decompressobj(wbits=31)
                yield unpacker.decompress(data)
                data = unpacker.unused_data
