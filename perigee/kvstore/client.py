"""What a worker imports to use the store node on its host.

Control goes over the node's Unix socket; payloads stay in the arena, which is mapped here too. All of it is for one
event loop, except `StoreClient.payload`, which any thread may call.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import cast

from google.protobuf.message import DecodeError

from perigee.kvstore import sockets
from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.blocks import NO_PARENT, BlockKey
from perigee.kvstore.dram import Arena, Mapping
from perigee.kvstore.errors import (
    BlocksMissing,
    Fenced,
    InvalidRequest,
    MalformedFrame,
    NoRoom,
    QuotaExceeded,
    StoreClosed,
    StoreError,
    TooLarge,
)
from perigee.kvstore.framing import MAX_FRAME_BYTES, FrameReader, frame
from perigee.kvstore.messages import Acquired, CommittedBlock, LeasedBlock, Reservation
from perigee.kvstore.wire import acquired_from_pb, blocks_from_pb, committed_to_pb, refused_from_pb

__all__ = [
    "Acquired",
    "BlocksMissing",
    "CommittedBlock",
    "Fenced",
    "InvalidRequest",
    "LeaseGroup",
    "LeasedBlock",
    "NoRoom",
    "QuotaExceeded",
    "Reservation",
    "StoreClient",
    "StoreClosed",
    "StoreError",
    "TooLarge",
]

_log = logging.getLogger(__name__)
_MAX_WAIT_MS = 2**32 - 1


class StoreClient:
    """A connection to a store node. When it ends, from either side, so do all leases and reservations made over it."""

    def __init__(self, connection: "_Connection", welcome: pb.Welcome, mapping: Mapping) -> None:
        self.node_id = welcome.node_id
        self.slot_bytes = welcome.slot_bytes
        self.num_slots = welcome.num_slots
        self._arena = Arena(mapping, welcome.slot_bytes)
        self._mapping = mapping
        self._connection = connection
        self._groups = itertools.count(1)

    @classmethod
    async def connect(
        cls, path: Path, *, worker_id: str, incarnation: str, payload_bytes: int, block_tokens: int
    ) -> "StoreClient":
        """Connects to the node at `path` and maps its arena.

        Raises InvalidRequest if the node keeps blocks of another size, StoreClosed if there is no node.
        """
        hello = pb.Hello(
            worker_id=worker_id, incarnation=incarnation, payload_bytes=payload_bytes, block_tokens=block_tokens
        )
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        raw.setblocking(False)
        with contextlib.ExitStack() as undo:
            undo.callback(raw.close)
            welcome, mapping = await _connect(path, raw, hello)
            undo.callback(mapping.close)
            await asyncio.to_thread(mapping.populate)
            _, connection = await asyncio.get_running_loop().create_unix_connection(_Connection, sock=raw)
            undo.pop_all()
        _log.info("store connected node=%s slots=%d", welcome.node_id, welcome.num_slots)
        return cls(connection, welcome, mapping)

    def group(self) -> "LeaseGroup":
        """A new, empty group. No round trip."""
        return LeaseGroup(self._connection, next(self._groups))

    def payload(self, slot: int) -> memoryview:
        """The bytes of a slot in the shared arena, writable. The view outlives the connection; the lease does not."""
        return self._arena.payload(slot)

    async def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which of `keys` are committed on the node, in any tier. Extends nothing."""
        reply = await self._connection.call(pb.LocalRequest(lookup=pb.Lookup(keys=keys)))
        return list(reply.found.committed)

    async def pin(self, tenant: str, keys: Sequence[BlockKey], ttl_s: float) -> list[bool]:
        """Keeps those of `keys` that are in the arena there for `ttl_s` seconds, whoever leases them; says which.

        Raises QuotaExceeded, with nothing changed, if the tenant may not pin that many.
        """
        reply = await self._connection.call(pb.LocalRequest(pin=pb.Pin(tenant=tenant, keys=keys, ttl_s=ttl_s)))
        return list(reply.pinned.pinned)

    async def unpin(self, tenant: str, keys: Sequence[BlockKey]) -> None:
        """Ends the tenant's pins on `keys`."""
        await self._connection.call(pb.LocalRequest(unpin=pb.Unpin(tenant=tenant, keys=keys)))

    async def wait_closed(self) -> None:
        """Returns when the connection is lost or closed."""
        await self._connection.closed.wait()

    async def close(self) -> None:
        """Ends the connection and with it every lease. Whoever waits for an answer gets StoreClosed."""
        self._connection.abort()
        await self.wait_closed()
        self._mapping.close()


class LeaseGroup:
    """Leases and reservations that end together, with `release` or with the connection.

    A caller that is cancelled while it waits must release the group: the answer may have been on its way.
    """

    def __init__(self, connection: "_Connection", group: int) -> None:
        self._connection = connection
        self._group = group
        self._released = False

    async def acquire(self, keys: Sequence[BlockKey], parent: BlockKey, wait_s: float) -> Acquired:
        """Leases the longest committed prefix of `keys` and reserves a slot for each key after it: all or nothing.

        What of the prefix is on the node's SSD is loaded first.
        `parent` is the key before `keys[0]`, the namespace for a whole prompt. Raises NoRoom if there was none within
        `wait_s` seconds, TooLarge if there never can be.
        """
        acquire = pb.Acquire(keys=keys, parent=parent, wait_ms=_milliseconds(wait_s))
        reply = await self._connection.call(self._request(acquire=acquire))
        return acquired_from_pb(reply.acquired)

    async def fetch(
        self, keys: Sequence[BlockKey], wait_s: float, source: str = "", parent: BlockKey = NO_PARENT
    ) -> AsyncGenerator[tuple[LeasedBlock, ...], None]:
        """Leases every key, in batches as they are committed. `source` is the node to pull from what is not here.

        `parent` is the key before `keys[0]`.

        Raises BlocksMissing at the end if some did not come within `wait_s` seconds; those that came stay leased.
        """
        fetch = pb.Fetch(keys=keys, wait_ms=_milliseconds(wait_s), source=source, parent=parent)
        async for reply in self._connection.stream(self._request(fetch=fetch)):
            if reply.fetched.blocks:
                yield blocks_from_pb(reply.fetched.blocks)
            if reply.fetched.missing:
                raise BlocksMissing(reply.fetched.missing)
            if reply.fetched.done:
                return

    async def commit(self, blocks: Sequence[CommittedBlock]) -> None:
        """Makes written slots readable, all or none; their headers and payloads must be complete.

        The group keeps a lease on each block. The slot itself is not the group's any more: if another group was first
        with the same key, its block counts and this slot is free. Raises InvalidRequest if a slot is not reserved,
        Fenced if it is, but for too long.
        """
        await self._connection.call(self._request(commit=committed_to_pb(blocks)))

    def release(self) -> None:
        """Ends the group: leases, reservations, and requests that still wait. Does not wait, never raises."""
        if not self._released:
            self._released = True
            self._connection.send(pb.LocalRequest(group=self._group, release=pb.Release()))

    def _request(
        self, *, acquire: pb.Acquire | None = None, fetch: pb.Fetch | None = None, commit: pb.Commit | None = None
    ) -> pb.LocalRequest:
        if self._released:
            raise InvalidRequest("the group is released")
        return pb.LocalRequest(group=self._group, acquire=acquire, fetch=fetch, commit=commit)


class _Connection(asyncio.Protocol):
    """Requests out, and each reply to whom it is for. Owns the socket."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._frames = FrameReader()
        self._requests = itertools.count(1)
        # By request. None stands for the end of the connection.
        self._replies: dict[int, asyncio.Queue[pb.LocalReply | None]] = {}

    async def call(self, request: pb.LocalRequest) -> pb.LocalReply:
        """Sends a request that has one reply. Raises what the node refuses it with, or StoreClosed."""
        with self._sent(request) as replies:
            return _checked(await replies.get())

    async def stream(self, request: pb.LocalRequest) -> AsyncIterator[pb.LocalReply]:
        """Sends a request and yields its replies for as long as the caller wants more."""
        with self._sent(request) as replies:
            while True:
                yield _checked(await replies.get())

    def send(self, request: pb.LocalRequest) -> None:
        """Sends a request; no effect on a closed connection. Raises InvalidRequest if it is too large for a frame."""
        body = request.SerializeToString()
        if len(body) > MAX_FRAME_BYTES:
            raise InvalidRequest(f"a request of {len(body)} bytes; allowed are {MAX_FRAME_BYTES}: ask for fewer keys")
        if self._transport:
            self._transport.write(frame(body))

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()

    @contextlib.contextmanager
    def _sent(self, request: pb.LocalRequest) -> Iterator["asyncio.Queue[pb.LocalReply | None]"]:
        """The queue of the replies to `request`, which is sent. Replies that come after the block are dropped."""
        if self.closed.is_set():
            raise StoreClosed("the connection to the store node is closed")
        request.request = next(self._requests)
        replies = self._replies[request.request] = asyncio.Queue()
        try:
            self.send(request)
            yield replies
        finally:
            del self._replies[request.request]

    # ---- what the event loop calls -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                reply = pb.LocalReply.FromString(body)
                if replies := self._replies.get(reply.request):
                    replies.put_nowait(reply)
        except (MalformedFrame, DecodeError) as error:
            _log.error("store node sent what is no reply, closing error=%s", error)
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.closed.set()
        for replies in self._replies.values():
            replies.put_nowait(None)


def _checked(reply: pb.LocalReply | None) -> pb.LocalReply:
    if reply is None:
        raise StoreClosed("the connection to the store node was lost")
    if reply.HasField("refused"):
        raise refused_from_pb(reply.refused)
    return reply


async def _connect(path: Path, raw: socket.socket, hello: pb.Hello) -> tuple[pb.Welcome, Mapping]:
    """Says hello to the node; the welcome, and the arena mapped into this process."""
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(raw, str(path))
        await loop.sock_sendall(raw, frame(pb.LocalRequest(hello=hello).SerializeToString()))
        body, fd = await sockets.receive_frame_with_descriptor(raw)
    except (OSError, EOFError) as error:
        raise StoreClosed(f"no store node at {str(path)!r}: {error}") from error
    if fd is None:
        _checked(pb.LocalReply.FromString(body))
        raise StoreError(f"the node at {str(path)!r} sent no arena")
    welcome = pb.LocalReply.FromString(body).welcome
    return welcome, Mapping(fd, welcome.slot_bytes * welcome.num_slots)


def _milliseconds(wait_s: float) -> int:
    return min(max(0, math.ceil(wait_s * 1000)), _MAX_WAIT_MS)
