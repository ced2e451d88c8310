"""The live side of a store: carries its answers to whom they are for, its jobs to those who do them, and tells it the
time.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Protocol

from perigee.kvstore.dram import Arena
from perigee.kvstore.feed import Feed
from perigee.kvstore.jobs import CancelPull, DropSegment, Job, Load, Pull, Spill
from perigee.kvstore.store import Store
from perigee.kvstore.waiting import Answer, Result

_log = logging.getLogger(__name__)

Receive = Callable[[int, Result], None]
"""Takes the answer to a request, given by its number."""


class DiskJobs(Protocol):
    """Who loads and spills. Every job that was started ends, with a call of the driver's."""

    def start(self, job: Load | Spill | DropSegment) -> None: ...


class PullJobs(Protocol):
    """Who pulls from other nodes. Every pull that was started ends, with a call of the driver's."""

    def start(self, job: Pull) -> None: ...

    def cancel(self, job: CancelPull) -> None: ...


class Driver:
    """Owns `store`, whose slots are those of `arena`. All of it is for one event loop.

    Whoever has asked the store for something passes its answers to `finish`, and does nothing else before.
    """

    def __init__(self, store: Store, arena: Arena, feed: Feed) -> None:
        self.store = store
        self.arena = arena
        self._feed = feed
        self._disk: DiskJobs | None = None
        self._pulls: PullJobs | None = None
        self._receivers: dict[int, Receive] = {}
        self._connections = itertools.count(1)
        self._loop = asyncio.get_running_loop()
        self._is_closed = False
        self._timer: asyncio.Handle | None = None
        self._timer_at: float | None = None  # kept here because uvloop's handles do not all tell when they are due

    def employ(self, disk: DiskJobs | None, pulls: PullJobs | None) -> None:
        """Says who does the store's jobs: before any can be asked for."""
        self._disk, self._pulls = disk, pulls

    @property
    def now(self) -> float:
        """The store's clock."""
        return self._loop.time()

    @property
    def living(self) -> set[int]:
        """The connections that are open."""
        return set(self._receivers)

    def connect(self, receive: Receive) -> int:
        """A new connection, whose answers `receive` gets."""
        connection = next(self._connections)
        self._receivers[connection] = receive
        return connection

    def disconnect(self, connection: int) -> None:
        """Ends all that the connection has and waits for."""
        del self._receivers[connection]
        self.finish(self.store.disconnect(connection, self.now))

    def finish(self, answers: list[Answer]) -> None:
        """After anything that the store did: passes on what came of it, and sets the clock for what still waits."""
        if self._is_closed:
            return
        for caller, result in answers:
            if receive := self._receivers.get(caller.group.connection):
                receive(caller.request, result)
        if events := self.store.take_events():
            self._feed.publish(events)
        for job in self.store.take_jobs():
            self._start(job)
        self._set_timer()

    def close(self) -> None:
        """No time passes any more, and nothing is begun."""
        self._is_closed = True
        if self._timer:
            self._timer.cancel()

    def _start(self, job: Job) -> None:
        match job:
            case Pull():
                assert self._pulls is not None
                self._pulls.start(job)
            case CancelPull():
                assert self._pulls is not None
                self._pulls.cancel(job)
            case _:
                assert self._disk is not None
                self._disk.start(job)

    def _set_timer(self) -> None:
        deadline = self.store.next_deadline()
        if deadline == self._timer_at:
            return
        if self._timer:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = None if deadline is None else self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = self._timer_at = None
        self.finish(self.store.expire(self.now))
