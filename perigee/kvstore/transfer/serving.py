"""One peer that pulls blocks from this node: what it asked for, what is on its way to it, and when it is cut off."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from perigee.kvstore.blocks import KEY_BYTES, BlockKey
from perigee.kvstore.errors import MalformedFrame
from perigee.kvstore.transfer import frames
from perigee.kvstore.transfer.base import BlockSource, PeerRefused, ReaderTooSlow, SourceBlock
from perigee.kvstore.transfer.frames import Ask, Kind, Reply, RequestHead
from perigee.kvstore.transfer.handshake import receive_exactly, refuse
from perigee.kvstore.transfer.settle import settle, shut_down

_QUEUED_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a peer may hold, and for how long.

    `window_blocks` is how many blocks are leased for one peer at a time, `lease_s` how long it may take to read a
    batch of them before it is cut off, `idle_s` after what silence its connection is closed.
    """

    window_blocks: int = 64
    lease_s: float = 30.0
    idle_s: float = 120.0


@dataclass(slots=True)
class Served:
    """What was served so far over all connections of a node, which count here."""

    blocks_total: int = 0
    bytes_total: int = 0
    fenced_total: int = 0  # peers that were slower than their leases


class Segment(Protocol):
    """This node's memory, as those peers see it that read it directly."""

    @property
    def name(self) -> str:
        """What a peer opens it by."""

    def address(self, payload: memoryview) -> int:
        """Where a slot lies."""


@dataclass(frozen=True, slots=True)
class Service:
    """What all connections of a node share. `threads` send payloads, at most one for each connection at a time."""

    source: BlockSource
    limits: Limits
    threads: Executor
    served: Served
    segment: Segment | None


@dataclass(frozen=True, slots=True)
class _Request:
    ask: Ask
    keys: Sequence[BlockKey]
    wait_s: float


_Batch = Sequence[tuple[int, SourceBlock]]  # blocks with their index in the whole request


class ServedPeer:
    """Answers the requests of one connection in order. The socket belongs to whoever made this."""

    def __init__(self, connection: socket.socket, service: Service) -> None:
        self._connection = connection
        self._service = service
        self._requests: asyncio.Queue[_Request] = asyncio.Queue(_QUEUED_REQUESTS)

    async def serve(self) -> None:
        """Serves until the peer falls silent. What was leased for it is released at the end, however that comes.

        Raises EOFError or OSError when the connection ends, MalformedFrame, PeerRefused, or ReaderTooSlow.
        """
        tasks = [asyncio.create_task(self._read_requests()), asyncio.create_task(self._answer_requests())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ---- what the peer asks --------------------------------------------------------------------------------------

    async def _read_requests(self) -> None:
        """Reads ahead, so that the end of the connection is noticed while a request is being answered."""
        while True:
            head = RequestHead.unpack(await receive_exactly(self._connection, frames.REQUEST_BYTES))
            keys = frames.unpack_keys(await receive_exactly(self._connection, head.num_keys * KEY_BYTES))
            await self._requests.put(_Request(head.ask, keys, head.wait_ms / 1000))

    async def _answer_requests(self) -> None:
        while request := await self._next_request(self._service.limits.idle_s):
            await self._answer(request)

    async def _next_request(self, timeout_s: float) -> _Request | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await self._requests.get()
        return None

    async def _answer(self, request: _Request) -> None:
        match request.ask:
            case Ask.PULL:
                await self._hand_over(request, self._send)
            case Ask.LOCATE:
                await self._name_segment()
                await self._hand_over(request, self._let_read)
            case Ask.DONE:
                raise MalformedFrame("DONE where nothing was located")
        await self._say(Reply(Kind.END).pack())

    # ---- what it gets --------------------------------------------------------------------------------------------

    async def _hand_over(self, request: _Request, hand_over: Callable[[_Batch], Awaitable[None]]) -> None:
        """Leases a window of the keys after the other, and hands over what comes as it comes."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request.wait_s
        size = self._service.limits.window_blocks
        for start in range(0, len(request.keys), size):
            keys = request.keys[start : start + size]
            leases = self._service.source.lease(keys, max(0.0, deadline - loop.time()))
            async with contextlib.aclosing(leases):
                async for blocks in leases:
                    await hand_over([(start + block.index, block) for block in blocks])
                    self._count(blocks)

    async def _send(self, batch: _Batch) -> None:
        """Sends payloads from where they lie. Does not return, or raise, before nothing reads them any more."""
        loop = asyncio.get_running_loop()
        sending = loop.run_in_executor(self._service.threads, _send_payloads, self._connection, batch, self._lease_s)
        try:
            async with asyncio.timeout(self._lease_s):
                await asyncio.shield(sending)
        except TimeoutError as error:
            raise self._too_slow(batch) from error
        finally:
            if not sending.done():
                shut_down(self._connection)
            await settle(sending)

    async def _let_read(self, batch: _Batch) -> None:
        """Says where payloads lie, and holds them there until the peer has read them."""
        assert self._service.segment, "asked for by those only who were told its name"
        address = self._service.segment.address
        located = [_reply(Kind.LOCATED, index, block, address(block.payload)) for index, block in batch]
        await self._say(b"".join(reply.pack() for reply in (*located, Reply(Kind.SYNC))))
        request = await self._next_request(self._lease_s)
        if request is None:
            raise self._too_slow(batch)
        if request.ask != Ask.DONE:
            raise MalformedFrame(f"{request.ask.name} where DONE was due")
        await self._say(Reply(Kind.HELD).pack())

    async def _name_segment(self) -> None:
        if self._service.segment is None:
            await refuse(self._connection, "this node's memory cannot be read directly")
            raise PeerRefused("the peer wants to read memory directly, which this node does not offer")
        await self._say(frames.pack_text(Kind.SEGMENT, self._service.segment.name))

    async def _say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._connection, data)

    @property
    def _lease_s(self) -> float:
        return self._service.limits.lease_s

    def _too_slow(self, batch: _Batch) -> ReaderTooSlow:
        self._service.served.fenced_total += 1
        return ReaderTooSlow(f"{len(batch)} blocks were not read within their lease of {self._lease_s} s")

    def _count(self, blocks: Sequence[SourceBlock]) -> None:
        self._service.served.blocks_total += len(blocks)
        self._service.served.bytes_total += sum(len(block.payload) for block in blocks)


def _send_payloads(connection: socket.socket, batch: _Batch, timeout_s: float) -> None:
    """Runs in a thread. The socket stays non-blocking for the event loop, which reads from it meanwhile."""
    with connection.dup() as blocking:
        blocking.settimeout(timeout_s)
        for index, block in batch:
            head = _reply(Kind.BLOCK, index, block).pack()
            sent = blocking.sendmsg([head, block.payload])  # one call for both, and mostly for all of a small block
            if sent < len(head):
                blocking.sendall(head[sent:])
            if sent < len(head) + len(block.payload):
                blocking.sendall(block.payload[max(0, sent - len(head)) :])


def _reply(kind: Kind, index: int, block: SourceBlock, address: int = 0) -> Reply:
    return Reply(kind, index, block.num_tokens, block.origin, len(block.payload), address)
