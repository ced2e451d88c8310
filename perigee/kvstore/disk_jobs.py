"""Carries out what a store asks of its SSD, in a few threads."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Protocol

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.driver import Driver
from perigee.kvstore.errors import CorruptRecord, StoreError, TierFailed
from perigee.kvstore.jobs import DropSegment, Load, Spill
from perigee.kvstore.records import Location, Record

_log = logging.getLogger(__name__)

_WRITERS = 2  # at once: the disk is busy, and threads are left for reads, for which somebody waits
_BATCH_BYTES = 8 << 20


class Log(Protocol):
    """What is asked of `ssd.SegmentLog`; see there."""

    def append_batch(self, blocks: list[tuple[Record, memoryview]], /) -> list[Location]: ...

    def read(self, location: Location, record_key: BlockKey, into: memoryview, /) -> Record: ...

    def drop(self, segment: int, /) -> None: ...


class SsdJobs:
    """Loads begin at once. Spills that wait for a writer are written together: small blocks in few system calls.

    A disk that does not answer within `timeout_s` seconds has failed, like one that answers with an error: what was not
    begun ends, and what hangs keeps its slots until it is over.
    """

    def __init__(self, log: Log, driver: Driver, threads: Executor, timeout_s: float) -> None:
        self._log = log
        self._driver = driver
        self._threads = threads
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._batch = max(1, _BATCH_BYTES // driver.arena.slot_bytes)
        self._spills: list[Spill] = []
        self._num_writers = 0
        self._under_way: dict[asyncio.Future[object], Future[object]] = {}  # with what the threads know it by
        self._answered_at = 0.0  # when a thread last ended a job, or the first of those under way was begun

    def start(self, job: Load | Spill | DropSegment) -> None:
        match job:
            case Load():
                slot = self._driver.arena.payload(job.slot)
                self._call(partial(self._log.read, job.location, job.key, slot), partial(self._loaded, job))
            case Spill():
                self._spills.append(job)
                self._write()
            case DropSegment():
                self._call(partial(self._log.drop, job.segment), partial(self._dropped, job))

    async def drained(self) -> None:
        """Returns when no thread touches a slot any more. Nothing may be started meanwhile."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    def _write(self) -> None:
        """Gives a writer as much as it may write in one go."""
        if not self._spills or self._num_writers == _WRITERS:
            return
        batch, self._spills = self._spills[: self._batch], self._spills[self._batch :]
        self._num_writers += 1
        blocks = [(spill.record, self._driver.arena.payload(spill.slot)) for spill in batch]
        self._call(partial(self._log.append_batch, blocks), partial(self._written, batch))

    def _call(self, work: Callable[[], object], ended: Callable[["asyncio.Future[object]"], None]) -> None:
        submitted = self._threads.submit(work)
        future = asyncio.wrap_future(submitted, loop=self._loop)
        if not self._under_way:
            self._answered_at = self._loop.time()
        self._under_way[future] = submitted
        timeout = self._loop.call_later(self._timeout_s, self._check_silence)
        future.add_done_callback(lambda _: timeout.cancel())
        future.add_done_callback(self._answered)
        future.add_done_callback(ended)

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _loaded(self, job: Load, future: "asyncio.Future[object]") -> None:
        record = self._outcome(future)
        assert record is None or isinstance(record, Record)
        self._driver.finish(self._driver.store.loaded(job.job, record, self._driver.now))

    def _written(self, batch: list[Spill], future: "asyncio.Future[object]") -> None:
        self._num_writers -= 1
        locations = self._outcome(future)
        assert locations is None or isinstance(locations, list)
        for spill, location in zip(batch, locations or [None] * len(batch), strict=True):
            self._driver.finish(self._driver.store.spilled(spill.job, location, self._driver.now))
        self._write()

    def _dropped(self, job: DropSegment, future: "asyncio.Future[object]") -> None:
        self._outcome(future)
        self._driver.finish(self._driver.store.dropped(job.segment, self._driver.now))

    def _outcome(self, future: "asyncio.Future[object]") -> object | None:
        """What the log returned, or None if it could not. If that was the disk's fault, the tier is off."""
        if future.cancelled():
            return None
        try:
            return future.result()
        except CorruptRecord as error:
            _log.warning("corrupt record dropped error=%s", error)
        except TierFailed as error:
            self._failed(error)
        except StoreError as error:
            _log.error("ssd job refused error=%s", error)
        return None

    def _answered(self, future: "asyncio.Future[object]") -> None:
        self._under_way.pop(future)
        self._answered_at = self._loop.time()

    def _check_silence(self) -> None:
        """A job has waited long. That the disk is busy with others before it is no reason to give the disk up."""
        left_s = self._answered_at + self._timeout_s - self._loop.time()
        if left_s <= 0:
            self._failed(TierFailed(f"the disk has not answered for {self._timeout_s} s"))
        elif self._under_way:
            self._loop.call_later(left_s, self._check_silence)

    def _failed(self, error: TierFailed) -> None:
        ssd = self._driver.store.ssd
        if ssd is None or ssd.is_off:
            return
        _log.error("ssd tier off, serving goes on without it error=%s", error)
        self._driver.finish(self._driver.store.ssd_failed(self._driver.now))
        for submitted in self._under_way.values():
            submitted.cancel()  # no effect on what a thread has begun
        spills, self._spills = self._spills, []
        for spill in spills:
            self._driver.finish(self._driver.store.spilled(spill.job, None, self._driver.now))
