"""What a Conductor's process writes down for people: receipts, and a recording of all that it hears and says."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from importlib.metadata import version
from logging.handlers import QueueHandler, QueueListener, WatchedFileHandler
from pathlib import Path
from queue import Full, Queue

from perigee.scheduler.commands import Command
from perigee.scheduler.config import ConductorConfig
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.errors import SchedulerError
from perigee.scheduler.events import Event
from perigee.scheduler.receipt_json import document
from perigee.scheduler.receipts import Receipt
from perigee.scheduler.recording.eventlog import Header
from perigee.scheduler.recording.files import Recorder

_log = logging.getLogger(__name__)

# One JSON line for each receipt that is complete, at level DEBUG.
_receipts_log = logging.getLogger("perigee.receipts")

# Lines that wait for the disk. More are dropped, so that a disk that hangs does not fill the memory.
_MAX_WAITING_LINES = 10_000


class Journal:
    """Told by the driver about every event. `unix_offset_s` turns readings of the loop's clock into Unix time."""

    def __init__(self, unix_offset_s: float = 0.0, recorder: Recorder | None = None) -> None:
        self.unix_offset_s = unix_offset_s
        self._recorder = recorder

    @classmethod
    @asynccontextmanager
    async def opened(cls, config: ConductorConfig, profile: CostProfile) -> AsyncIterator["Journal"]:
        """As `config` says, written to its end when the context is left. Raises SchedulerError."""
        unix_offset_s = time.time() - asyncio.get_running_loop().time()
        header = Header(config.policies, profile, version("perigee"), unix_offset_s, config.role_hold_s, config.weights)
        with _receipts_to(config.receipts_file) if config.receipts_file else nullcontext():
            if config.record is None:
                yield cls(unix_offset_s)
                return
            recorder = Recorder(config.record, header, config.record_bytes)
            writing = asyncio.create_task(recorder.run())
            try:
                yield cls(unix_offset_s, recorder)
            finally:
                writing.cancel()
                recorder.close()

    def note(self, event: Event, now: float, commands: Sequence[Command]) -> None:
        """The Conductor heard and said this."""
        if self._recorder is not None:
            self._recorder.take(event, now, commands)

    def log(self, ended: Iterable[Receipt]) -> None:
        """These requests are over."""
        if not _receipts_log.isEnabledFor(logging.DEBUG):
            return
        for receipt in ended:
            _receipts_log.debug("%s", self.document(receipt))

    def document(self, receipt: Receipt) -> str:
        """A receipt in JSON."""
        return json.dumps(document(receipt, self.unix_offset_s), separators=(",", ":"))


@contextmanager
def _receipts_to(path: Path) -> Iterator[None]:
    """Receipts go to this file, and no longer to the process's log. One that is moved away is begun anew."""
    try:
        file = WatchedFileHandler(path, encoding="utf-8")
    except OSError as error:
        raise SchedulerError(f"receipts_file: {str(path)!r} cannot be written: {error.strerror}") from error
    waiting: Queue[logging.LogRecord] = Queue(_MAX_WAITING_LINES)
    listener = QueueListener(waiting, file)
    handler = _Dropping(waiting)
    before = _receipts_log.level, _receipts_log.propagate
    _receipts_log.addHandler(handler)
    _receipts_log.setLevel(logging.DEBUG)
    _receipts_log.propagate = False
    listener.start()
    try:
        yield
    finally:
        _receipts_log.removeHandler(handler)
        _receipts_log.setLevel(before[0])
        _receipts_log.propagate = before[1]
        listener.stop()
        file.close()


class _Dropping(QueueHandler):
    """Keeps file I/O off the event loop."""

    def __init__(self, waiting: "Queue[logging.LogRecord]") -> None:
        super().__init__(waiting)
        self._dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except Full:
            self._dropped += 1
            if self._dropped == 1:
                _log.error("receipts are dropped: their file is written too slowly")
