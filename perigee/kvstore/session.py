"""A worker's connection to the node of its host, and what it asks of the store."""

import asyncio
import logging
from typing import cast

from google.protobuf.message import DecodeError

from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.blocks import NO_PARENT, BlockKey
from perigee.kvstore.driver import Driver
from perigee.kvstore.errors import Fenced, InvalidRequest, MalformedFrame, QuotaExceeded
from perigee.kvstore.framing import FrameReader, frame
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.messages import Acquired, Fetched
from perigee.kvstore.waiting import Answer, Caller, Result
from perigee.kvstore.wire import acquired_to_pb, committed_from_pb, fetched_to_pb, refused_to_pb

_log = logging.getLogger(__name__)


class Session(asyncio.Protocol):
    """One worker's connection. Its end is the end of all that the worker has here."""

    def __init__(self, node_id: str, driver: Driver, worker_id: str) -> None:
        self.worker_id = worker_id
        self._node_id = node_id
        self._driver = driver
        self._store = driver.store
        self._connection = driver.connect(self._answer)
        self._frames = FrameReader()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _log.info("worker connected worker=%s connection=%d", self.worker_id, self._connection)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._handle(pb.LocalRequest.FromString(body))
        except (MalformedFrame, DecodeError) as error:
            _log.warning("worker cut off worker=%s connection=%d error=%s", self.worker_id, self._connection, error)
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._driver.disconnect(self._connection)
        _log.info("worker disconnected worker=%s connection=%d", self.worker_id, self._connection)

    # A worker that does not read its replies gets no more of its requests read.

    def pause_writing(self) -> None:
        if self._transport:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport:
            self._transport.resume_reading()

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()

    def _send(self, reply: pb.LocalReply) -> None:
        if self._transport:
            self._transport.write(frame(reply.SerializeToString()))

    def _answer(self, request: int, result: Result) -> None:
        self._send(_reply(request, result))

    def _handle(self, request: pb.LocalRequest) -> None:
        """Carries out a request. Raises MalformedFrame for one that this protocol does not have here."""
        reply = pb.LocalReply(request=request.request)
        caller = Caller(GroupId(self._connection, request.group), request.request)
        try:
            self._driver.finish(self._carry_out(caller, request, reply))
        except (InvalidRequest, QuotaExceeded, Fenced) as error:
            if isinstance(error, Fenced):
                _log.warning("writer fenced worker=%s connection=%d error=%s", self.worker_id, self._connection, error)
            reply.refused.CopyFrom(refused_to_pb(error))
        if reply.WhichOneof("result"):
            self._send(reply)

    def _carry_out(self, caller: Caller, request: pb.LocalRequest, reply: pb.LocalReply) -> list[Answer]:
        """Fills `reply` where the store answers the caller at once and with one message."""
        now = self._driver.now
        match request.WhichOneof("op"):
            case "lookup":
                reply.found.committed.extend(self._store.lookup(_keys(request.lookup)))
                return []
            case "acquire":
                acquire = request.acquire
                parent = BlockKey(acquire.parent)
                return self._store.acquire(caller, _keys(acquire), parent, acquire.wait_ms / 1000, now)
            case "fetch":
                return self._fetch(caller, request.fetch, now)
            case "commit":
                reply.committed.SetInParent()
                return self._store.commit(caller.group, committed_from_pb(request.commit), now)
            case "release":
                return self._store.release(caller.group, now)
            case "pin":
                pin = request.pin
                reply.pinned.pinned.extend(self._store.pin(pin.tenant, _keys(pin), pin.ttl_s, now))
                return []
            case "unpin":
                reply.unpinned.SetInParent()
                return self._store.unpin(request.unpin.tenant, _keys(request.unpin), now)
            case op:
                raise MalformedFrame(f"unexpected operation: {op}")

    def _fetch(self, caller: Caller, fetch: pb.Fetch, now: float) -> list[Answer]:
        source = "" if fetch.source == self._node_id else fetch.source
        parent = BlockKey(fetch.parent) if fetch.parent else NO_PARENT
        return self._store.fetch(caller, _keys(fetch), fetch.wait_ms / 1000, now, source, parent)


def _keys(message: pb.Acquire | pb.Fetch | pb.Lookup | pb.Pin | pb.Unpin) -> list[BlockKey]:
    return cast(list[BlockKey], list(message.keys))


def _reply(request: int, result: Result) -> pb.LocalReply:
    match result:
        case Acquired():
            return pb.LocalReply(request=request, acquired=acquired_to_pb(result))
        case Fetched():
            return pb.LocalReply(request=request, fetched=fetched_to_pb(result))
        case _:
            return pb.LocalReply(request=request, refused=refused_to_pb(result))
