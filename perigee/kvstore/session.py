"""The workers that are connected to a node, and what they ask of its store."""

import asyncio
import itertools
import logging
from typing import cast

from google.protobuf.message import DecodeError

from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.errors import InvalidRequest, MalformedFrame, StoreError
from perigee.kvstore.feed import Feed
from perigee.kvstore.framing import FrameReader, frame
from perigee.kvstore.index import GroupId
from perigee.kvstore.messages import Acquired, Fetched
from perigee.kvstore.store import Answer, Caller, Store
from perigee.kvstore.wire import acquired_to_pb, committed_from_pb, fetched_to_pb, refused_to_pb

_log = logging.getLogger(__name__)


class Session(asyncio.Protocol):
    """One worker's connection. Its end is the end of all that the worker has here."""

    def __init__(self, sessions: "Sessions", connection: int, worker_id: str) -> None:
        self.connection = connection
        self.worker_id = worker_id
        self._sessions = sessions
        self._frames = FrameReader()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._sessions.connected(self)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._sessions.handle(self, pb.LocalRequest.FromString(body))
        except (MalformedFrame, DecodeError) as error:
            _log.warning("worker cut off worker=%s connection=%d error=%s", self.worker_id, self.connection, error)
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._sessions.disconnected(self)

    # A worker that does not read its replies gets no more of its requests read.

    def pause_writing(self) -> None:
        if self._transport:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport:
            self._transport.resume_reading()

    def send(self, reply: pb.LocalReply) -> None:
        if self._transport:
            self._transport.write(frame(reply.SerializeToString()))

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()


class Sessions:
    """Passes requests to `store`, its answers to whom they are for, and its events to `feed`."""

    def __init__(self, node_id: str, store: Store, feed: Feed) -> None:
        self.store = store
        self._node_id = node_id
        self._feed = feed
        self._sessions: dict[int, Session] = {}
        self._connections = itertools.count(1)
        self._timer: asyncio.Handle | None = None
        self._timer_at: float | None = None  # kept here because uvloop's handles do not all tell when they are due

    def new(self, worker_id: str) -> Session:
        return Session(self, next(self._connections), worker_id)

    @property
    def living(self) -> set[int]:
        """The connections that are open."""
        return set(self._sessions)

    def connected(self, session: Session) -> None:
        self._sessions[session.connection] = session
        _log.info("worker connected worker=%s connection=%d", session.worker_id, session.connection)

    def disconnected(self, session: Session) -> None:
        del self._sessions[session.connection]
        self._finish(self.store.disconnect(session.connection, _now()))
        _log.info("worker disconnected worker=%s connection=%d", session.worker_id, session.connection)

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
        for session in self._sessions.values():
            session.abort()

    def handle(self, session: Session, request: pb.LocalRequest) -> None:
        """Carries out a request. Raises MalformedFrame for one that this protocol does not have here."""
        reply = pb.LocalReply(request=request.request)
        caller = Caller(GroupId(session.connection, request.group), request.request)
        try:
            self._finish(self._carry_out(caller, request, reply))
        except InvalidRequest as error:
            reply.refused.CopyFrom(refused_to_pb(error))
        if reply.WhichOneof("result"):
            session.send(reply)

    def _carry_out(self, caller: Caller, request: pb.LocalRequest, reply: pb.LocalReply) -> list[Answer]:
        """Fills `reply` where the store answers the caller at once and with one message."""
        match request.WhichOneof("op"):
            case "acquire":
                acquire = request.acquire
                keys, parent = cast(list[BlockKey], list(acquire.keys)), BlockKey(acquire.parent)
                return self.store.acquire(caller, keys, parent, acquire.wait_ms / 1000, _now())
            case "fetch":
                return self._fetch(caller, request.fetch)
            case "commit":
                reply.committed.SetInParent()
                return self.store.commit(caller.group, committed_from_pb(request.commit), _now())
            case "release":
                return self.store.release(caller.group, _now())
            case "lookup":
                keys = cast(list[BlockKey], request.lookup.keys)
                reply.found.committed.extend(self.store.lookup(keys))
                return []
            case op:
                raise MalformedFrame(f"unexpected operation: {op}")

    def _fetch(self, caller: Caller, fetch: pb.Fetch) -> list[Answer]:
        if fetch.source not in ("", self._node_id):
            raise InvalidRequest(f"source: {fetch.source!r} is not this node, {self._node_id!r}, the only one it reads")
        keys = cast(list[BlockKey], list(fetch.keys))
        return self.store.fetch(caller, keys, fetch.wait_ms / 1000, _now())

    def _finish(self, answers: list[Answer]) -> None:
        """After anything that the store did: sends its answers and events, and sets the clock for what still waits."""
        for caller, result in answers:
            if session := self._sessions.get(caller.group.connection):
                session.send(_reply(caller.request, result))
        if events := self.store.index.take_events():
            self._feed.publish(events)
        self._set_timer()

    def _set_timer(self) -> None:
        deadline = self.store.next_deadline()
        if deadline == self._timer_at:
            return
        if self._timer:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = None if deadline is None else asyncio.get_running_loop().call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = self._timer_at = None
        self._finish(self.store.expire(_now()))


def _reply(request: int, result: Acquired | Fetched | StoreError) -> pb.LocalReply:
    match result:
        case Acquired():
            return pb.LocalReply(request=request, acquired=acquired_to_pb(result))
        case Fetched():
            return pb.LocalReply(request=request, fetched=fetched_to_pb(result))
        case _:
            return pb.LocalReply(request=request, refused=refused_to_pb(result))


def _now() -> float:
    return asyncio.get_running_loop().time()
