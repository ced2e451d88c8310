"""Keeping an ear on one member of the cluster: its Watch stream, reopened for as long as it stays a member."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

import grpc

from perigee.kvstore import store_pb2
from perigee.kvstore.access import OPEN, Access
from perigee.kvstore.directory import Member
from perigee.kvstore.store_pb2_grpc import StoreNodeStub
from perigee.scheduler.errors import InvalidMessage
from perigee.scheduler.events import BlockEvents, Event, StoreLost, WorkerJoined, WorkerLost
from perigee.scheduler.ids import NodeId, WorkerId
from perigee.scheduler.wire import blocks_from_pb, worker_report_from_pb
from perigee.workers import worker_pb2
from perigee.workers.worker_pb2_grpc import WorkerStub

_log = logging.getLogger(__name__)

Emit = Callable[[Event], None]

_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.05, 1.0
_STATUS_TIMEOUT_S = 0.5


class Watch(ABC):
    """One member's stream. Subclasses say which, what its messages mean, and what it means that it broke."""

    def __init__(self, member: Member, emit: Emit, access: Access = OPEN) -> None:
        self.member = member
        self._access = access
        self._emit = emit
        self._heard = False  # something, over the stream that is open now
        self._reopen = False

    async def run(self) -> None:
        """Listens until cancelled."""
        backoff_s = _FIRST_BACKOFF_S
        try:
            while True:
                await self._listen()
                backoff_s = _FIRST_BACKOFF_S if self._heard else min(2 * backoff_s, _LAST_BACKOFF_S)
                if not self._reopen:
                    self._end()
                await asyncio.sleep(backoff_s)
        finally:
            self._end()

    def reopen(self) -> None:
        """After the message at hand, starts over with a new stream; the member does not count as lost."""
        self._reopen = True

    async def _listen(self) -> None:
        """Returns when the stream is broken, or is to be reopened."""
        self._reopen = False
        try:
            async with self._channel() as channel:
                await self._receive(channel)
        except grpc.aio.AioRpcError as error:
            _log.warning("watch broke member=%s error=%s %s", self.member.id, error.code(), error.details())
        except InvalidMessage as error:
            _log.warning("watch ended member=%s invalid message: %s", self.member.id, error)

    def _channel(self) -> grpc.aio.Channel:
        """A channel that shares no connection, and so no backoff, with others to the same target."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        return self._access.channel(self.member.address, options)

    def _end(self) -> None:
        if self._heard:
            self._heard = False
            self._emit(self._lost())

    @abstractmethod
    async def _receive(self, channel: grpc.aio.Channel) -> None:
        """Turns the messages of one stream into events."""

    @abstractmethod
    def _lost(self) -> Event:
        """The event that ends what this watch has told."""


class WorkerWatch(Watch):
    """A worker's reports. It has joined with its first report over a stream, and is lost with the stream."""

    async def _receive(self, channel: grpc.aio.Channel) -> None:
        async for message in WorkerStub(channel).Watch(worker_pb2.WatchRequest()):
            report = worker_report_from_pb(message)
            if not self._heard:
                self._heard = True
                self._emit(self._joined())
            self._emit(report)

    def _joined(self) -> WorkerJoined:
        member = self.member
        return WorkerJoined(WorkerId(member.id), member.incarnation, member.address, NodeId(member.store))

    def _lost(self) -> WorkerLost:
        return WorkerLost(WorkerId(self.member.id), self.member.incarnation)


class StoreWatch(Watch):
    """A store node's blocks."""

    async def _receive(self, channel: grpc.aio.Channel) -> None:
        async for message in StoreNodeStub(channel).Watch(store_pb2.WatchRequest()):
            events = blocks_from_pb(message)
            self._check(events)
            self._heard = True
            self._emit(events)
            if self._reopen:
                return

    async def status(self) -> store_pb2.StoreStatus | None:
        """What the node says of itself now; None if it does not answer in time."""
        try:
            async with self._channel() as channel:
                return await StoreNodeStub(channel).Status(store_pb2.StatusRequest(), timeout=_STATUS_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None

    def _check(self, events: BlockEvents) -> None:
        """Another process may have taken over the address before the directory says so."""
        if (events.node_id, events.incarnation) != (self.member.id, self.member.incarnation):
            raise InvalidMessage(
                f"node_id, incarnation: are {events.node_id!r}, {events.incarnation!r}, "
                f"allowed are {self.member.id!r}, {self.member.incarnation!r}"
            )

    def _lost(self) -> StoreLost:
        return StoreLost(NodeId(self.member.id), self.member.incarnation)
