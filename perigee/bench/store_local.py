"""How fast a worker gets at its host's blocks: reads, puts and lookups through a socket, beside a bare copy."""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_intdigest

from perigee.kvstore.blocks import HEADER_BYTES, KEY_BYTES, NO_PARENT, PREFILL, BlockKey, PayloadHeader
from perigee.kvstore.client import StoreClient
from perigee.kvstore.errors import StoreClosed
from perigee.kvstore.evict import LRU
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.messages import Acquired, CommittedBlock
from perigee.kvstore.store import Store
from perigee.kvstore.waiting import Caller

LOOKUP_KEYS = 64  # asked for at a time
_BLOCK_TOKENS = 256
_POLL_S = 0.01
_IN_FLIGHT = 4  # lookups that a worker has on the way at a time, as one for each sequence would


@dataclass(frozen=True, slots=True)
class LocalRates:
    """GB/s of reads, puts and bare copies of blocks, and keys/s of lookups through the socket."""

    read: float
    put: float
    memcpy: float
    socket_keys: float


def measure_local(block_bytes: int, *, total_bytes: int, repeats: int) -> LocalRates:
    """Moves `total_bytes` in blocks of `block_bytes` in each way, in turn; the best of `repeats` counts.

    A read leases blocks and copies them out of the arena; a put reserves slots, copies into them, makes the checksums
    and commits. The node is a process of its own, as it always is.
    """
    return asyncio.run(_measure(block_bytes, total_bytes, repeats))


def lookup_keys_per_s(num_blocks: int = 20_000, seconds: float = 1.0) -> float:
    """Keys looked up in a store of `num_blocks` blocks each second, `LOOKUP_KEYS` at a time, without any socket."""
    store = Store(num_blocks, _BLOCK_TOKENS, LRU())
    keys = _keys(b"index", num_blocks)
    for start in range(0, num_blocks, LOOKUP_KEYS):
        _put_into(store, keys[start : start + LOOKUP_KEYS])
    batches = [keys[start : start + LOOKUP_KEYS] for start in range(0, num_blocks - LOOKUP_KEYS, LOOKUP_KEYS)]
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for batch in batches:
            assert all(store.lookup(batch))
            count += len(batch)
    return count / (time.perf_counter() - began)


def _put_into(store: Store, keys: Sequence[BlockKey]) -> None:
    caller = Caller(GroupId(1, 1), 1)
    ((_, acquired),) = store.acquire(caller, keys, NO_PARENT, 0.0, 0.0)
    assert isinstance(acquired, Acquired)
    store.commit(caller.group, [CommittedBlock(r.slot, r.nonce, 1, PREFILL) for r in acquired.reserved], 0.0)
    store.release(caller.group, 0.0)


async def _measure(block_bytes: int, total_bytes: int, repeats: int) -> LocalRates:
    num_blocks = total_bytes // block_bytes
    with tempfile.TemporaryDirectory() as folder, _node(Path(folder), 2 * num_blocks * block_bytes) as path:
        async with _connected(path, block_bytes) as client:
            worker = _Worker(client, num_blocks)
            best = {name: float("inf") for name in ("memcpy", "put", "read")}
            for number in range(repeats + 1):
                for name, seconds in (await worker.round(number)).items():
                    best[name] = min(best[name], seconds)
            size = num_blocks * block_bytes / 1e9
            return LocalRates(size / best["read"], size / best["put"], size / best["memcpy"], await worker.lookups())


@contextlib.contextmanager
def _node(folder: Path, dram_bytes: int) -> Iterator[Path]:
    """A store node's socket. It is in no cluster."""
    path = folder / "store.sock"
    flags = (f"--socket={path}", f"--directory=unix:{folder}/none", f"--dram-bytes={dram_bytes}", "--log-level=error")
    environment = {**os.environ, "GRPC_VERBOSITY": "NONE"}
    with subprocess.Popen([sys.executable, "-m", "perigee", "store", *flags], env=environment) as process:
        try:
            yield path
        finally:
            process.terminate()


@contextlib.asynccontextmanager
async def _connected(path: Path, block_bytes: int) -> AsyncIterator[StoreClient]:
    client = None
    while client is None:
        try:
            client = await StoreClient.connect(
                path, worker_id="bench", incarnation="1", payload_bytes=block_bytes, block_tokens=_BLOCK_TOKENS
            )
        except StoreClosed:  # it is still starting
            await asyncio.sleep(_POLL_S)
    try:
        yield client
    finally:
        await client.close()


class _Worker:
    """Puts `num_blocks` blocks of bytes that are its own, and reads them again."""

    def __init__(self, client: StoreClient, num_blocks: int) -> None:
        self._client = client
        self._num_blocks = num_blocks
        self._keys: list[BlockKey] = []
        size = client.slot_bytes
        # As large as all blocks: what is copied comes from memory and goes to memory, not to a cache.
        self._from = memoryview(bytearray(os.urandom(size)) * num_blocks)
        self._into = memoryview(bytearray(b"\1") * (size * num_blocks))

    async def round(self, number: int) -> dict[str, float]:
        """Seconds of each way to move all blocks once."""
        self._keys = _keys(b"%d" % number, self._num_blocks)
        return {
            "memcpy": await _elapsed_s(self._copy),
            "put": await _elapsed_s(self._put),
            "read": await _elapsed_s(self._read),
        }

    async def lookups(self, seconds: float = 1.0) -> float:
        """Keys looked up in a second."""
        keys = (self._keys * LOOKUP_KEYS)[:LOOKUP_KEYS]
        batch = list(dict.fromkeys([*keys, *_keys(b"none", LOOKUP_KEYS)]))[:LOOKUP_KEYS]
        began = time.perf_counter()
        counts = await asyncio.gather(*(self._look_up(batch, began + seconds) for _ in range(_IN_FLIGHT)))
        return sum(counts) / (time.perf_counter() - began)

    async def _look_up(self, batch: Sequence[BlockKey], until: float) -> int:
        count = 0
        while time.perf_counter() < until:
            count += len(await self._client.lookup(batch))
        return count

    def _mine(self, memory: memoryview, index: int) -> memoryview:
        size = self._client.slot_bytes
        return memory[index * size : (index + 1) * size]

    async def _copy(self) -> None:
        for index in range(self._num_blocks):
            self._mine(self._into, index)[:] = self._mine(self._from, index)

    async def _put(self) -> None:
        group = self._client.group()
        acquired = await group.acquire(self._keys, NO_PARENT, 0.0)
        await group.commit([self._write(r.slot, r.nonce, r.index) for r in acquired.reserved])
        group.release()

    def _write(self, slot: int, nonce: int, index: int) -> CommittedBlock:
        payload = self._client.payload(slot)
        payload[HEADER_BYTES:] = self._mine(self._from, index)[HEADER_BYTES:]
        checksum = xxh3_64_intdigest(payload[HEADER_BYTES:])
        payload[:HEADER_BYTES] = PayloadHeader(1, PREFILL, checksum).pack()
        return CommittedBlock(slot, nonce, 1, PREFILL)

    async def _read(self) -> None:
        group = self._client.group()
        async for blocks in group.fetch(self._keys, 0.0):
            for block in blocks:
                self._mine(self._into, block.index)[:] = self._client.payload(block.slot)
        group.release()


async def _elapsed_s(way: Callable[[], Awaitable[None]]) -> float:
    began = time.perf_counter()
    await way()
    return time.perf_counter() - began


def _keys(name: bytes, count: int) -> list[BlockKey]:
    return [BlockKey(name.ljust(KEY_BYTES - 8, b"\0") + index.to_bytes(8, "little")) for index in range(count)]
