"""Servers of scripted blocks, slots to pull into, and a proxy that spoils the link between them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from perigee.kvstore.blocks import HEADER_BYTES, BlockKey
from perigee.kvstore.transfer.base import Received, Transfer, Wanted
from perigee.kvstore.transfer.listening import split
from perigee.kvstore.transfer.serving import Limits, Segment
from perigee.kvstore.transfer.tcp_server import TransferServer
from tests.kvstore.fake_transfer import MemorySource, payload_of

SLOT_BYTES = 64 << 10
WAIT_S = 60.0  # for what must come; nothing here waits that long


def payload(index: int, slot_bytes: int = SLOT_BYTES) -> bytes:
    """The payload of the block of `index`: no two are alike."""
    return payload_of(bytes([index % 256]) * (slot_bytes - HEADER_BYTES))


def source_of(keys: Sequence[BlockKey], slot_bytes: int = SLOT_BYTES) -> MemorySource:
    return MemorySource({key: payload(index, slot_bytes) for index, key in enumerate(keys)})


class Slots:
    """The receiver's memory: a slot for each key."""

    def __init__(self, keys: Sequence[BlockKey], slot_bytes: int = SLOT_BYTES) -> None:
        self._slot_bytes = slot_bytes
        memory = memoryview(bytearray(len(keys) * slot_bytes))
        self._views = [memory[start : start + slot_bytes] for start in range(0, len(memory), slot_bytes)]
        self.wanted = [
            Wanted(index, key, view) for index, (key, view) in enumerate(zip(keys, self._views, strict=True))
        ]

    def holds(self, index: int) -> bool:
        """Whether the slot has the payload of its block."""
        return self._views[index] == payload(index, self._slot_bytes)


@contextlib.asynccontextmanager
async def serving(
    source: MemorySource, *, secret: bytes = b"", limits: Limits | None = None, segment: Segment | None = None
) -> AsyncIterator[TransferServer]:
    server = TransferServer("node", "127.0.0.1:0", source, secret=secret, limits=limits, segment=segment)
    task = asyncio.create_task(server.serve())
    try:
        yield server
    finally:
        task.cancel()
        await asyncio.wait([task])
        server.close()


async def pulled(transfer: Transfer, peer: str, wanted: Sequence[Wanted], wait_s: float = WAIT_S) -> list[Received]:
    """All that comes, by index."""
    async with contextlib.aclosing(transfer.pull(peer, wanted, wait_s)) as blocks:
        return sorted([block async for block in blocks], key=lambda block: block.index)


Spoil = Callable[[int, bytearray], bool]


@contextlib.asynccontextmanager
async def proxy(peer: str, spoil: Spoil) -> AsyncIterator[str]:
    """The address of a link to `peer`. `spoil` may change what comes from there, and ends the link by answering False.

    It gets the place of the first byte in the stream, and the bytes.
    """

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Spoil) -> None:
        place = 0
        with contextlib.suppress(ConnectionError):
            while data := bytearray(await reader.read(32 << 10)):
                if not change(place, data):
                    break
                writer.write(data)
                await writer.drain()
                place += len(data)
        writer.transport.abort()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(*split(peer))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(copy(reader, there_writer, lambda *_: True))
            tasks.create_task(copy(there_reader, writer, spoil))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.close()
