"""The other process of `store_transfer`: has blocks, and gives them away in each way that is measured."""

import asyncio
import contextlib
import json
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Sequence

from xxhash import xxh3_64_intdigest

from perigee.kvstore.blocks import HEADER_BYTES, KEY_BYTES, PREFILL, BlockKey, PayloadHeader
from perigee.kvstore.dram import Mapping, allocate
from perigee.kvstore.transfer.base import BackendMissing, SourceBlock
from perigee.kvstore.transfer.mooncake import MooncakeEngine
from perigee.kvstore.transfer.tcp_server import TransferServer

_NUM_TOKENS = 32


def block_key(index: int) -> BlockKey:
    """What the peer's block of `index` is called."""
    return BlockKey(index.to_bytes(KEY_BYTES, "little"))


class _Blocks:
    """A `BlockSource` whose blocks are all there."""

    def __init__(self, slots: Sequence[memoryview]) -> None:
        self._slots = {block_key(index): slot for index, slot in enumerate(slots)}

    async def lease(self, keys: Sequence[BlockKey], wait_s: float) -> AsyncGenerator[tuple[SourceBlock, ...], None]:
        yield tuple(SourceBlock(index, _NUM_TOKENS, PREFILL, self._slots[key]) for index, key in enumerate(keys))


def main(block_bytes: int, num_blocks: int) -> None:
    """Prints where everything is as a line of JSON, and serves until standard input ends."""
    size_bytes = block_bytes * num_blocks
    mapping = Mapping(allocate(size_bytes), size_bytes)
    mapping.populate()
    slots = [mapping.view(index * block_bytes, block_bytes) for index in range(num_blocks)]
    for index, slot in enumerate(slots):
        _write(slot, index)
    asyncio.run(_serve(mapping.view(0, size_bytes), slots))


async def _serve(memory: memoryview, slots: Sequence[memoryview]) -> None:
    server = TransferServer("peer", "127.0.0.1:0", _Blocks(slots))
    serving = asyncio.create_task(server.serve())
    bare = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve_bare, args=(bare, slots), daemon=True).start()
    places: dict[str, str | int] = {"address": server.address, "bare": bare.getsockname()[1]}
    engine = _start_mooncake(memory)
    if engine:
        places |= {"segment": engine.name, "memory": engine.address(memory)}
    sys.stdout.write(json.dumps(places) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    serving.cancel()
    await asyncio.wait([serving])
    server.close()
    if engine:
        engine.close()


def _start_mooncake(memory: memoryview) -> MooncakeEngine | None:
    with contextlib.suppress(BackendMissing):
        return MooncakeEngine("127.0.0.1", memory)
    return None


def _serve_bare(listener: socket.socket, slots: Sequence[memoryview]) -> None:
    """Sends all payloads, one after the other, for each byte that comes."""
    connection, _ = listener.accept()
    with connection:
        while connection.recv(1):
            for slot in slots:
                connection.sendall(slot)


def _write(slot: memoryview, index: int) -> None:
    """A payload of its own, header and checksum included."""
    slot[HEADER_BYTES:] = bytes([index % 256]) * (len(slot) - HEADER_BYTES)
    slot[:HEADER_BYTES] = PayloadHeader(_NUM_TOKENS, PREFILL, xxh3_64_intdigest(slot[HEADER_BYTES:])).pack()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
