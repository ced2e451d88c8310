"""A scripted stand-in for a store: blocks that are served from memory."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

from xxhash import xxh3_64_intdigest

from perigee.kvstore.blocks import PREFILL, BlockKey, PayloadHeader
from perigee.kvstore.transfer.base import SourceBlock


def payload_of(content: bytes, num_tokens: int = 32) -> bytes:
    """A whole payload: `content` behind a header that is right."""
    return PayloadHeader(num_tokens, PREFILL, xxh3_64_intdigest(content)).pack() + content


class MemorySource:
    """A `BlockSource`. The test commits blocks, at once or later; a payload may be anything, also a wrong one."""

    def __init__(self, blocks: Mapping[BlockKey, bytes] | None = None) -> None:
        self.leased: dict[BlockKey, int] = {}  # to how many hold it now; no zeros are kept
        self.most_leased = 0  # blocks at a time
        self.changed = asyncio.Event()  # set whenever leases begin or end
        self._payloads = {key: memoryview(payload) for key, payload in (blocks or {}).items()}
        self._committed = asyncio.Event()

    def commit(self, key: BlockKey, payload: bytes | bytearray) -> None:
        self._payloads[key] = memoryview(payload)
        self._committed.set()
        self._committed = asyncio.Event()

    async def lease(self, keys: Sequence[BlockKey], wait_s: float) -> AsyncGenerator[tuple[SourceBlock, ...], None]:
        deadline = asyncio.get_running_loop().time() + wait_s
        awaited = dict(enumerate(keys))
        try:
            while awaited:
                committed = self._committed
                here = [index for index, key in awaited.items() if key in self._payloads]
                if here:
                    yield tuple(self._lease(index, awaited.pop(index)) for index in here)
                elif not await _set_before(committed, deadline):
                    return
        finally:
            self._release([key for index, key in enumerate(keys) if index not in awaited])

    async def until(self, num_leased: int) -> None:
        """Returns when so many blocks are leased."""
        while len(self.leased) != num_leased:
            await self.changed.wait()

    def _lease(self, index: int, key: BlockKey) -> SourceBlock:
        self.leased[key] = self.leased.get(key, 0) + 1
        self.most_leased = max(self.most_leased, len(self.leased))
        self._notify()
        payload = self._payloads[key]
        header = PayloadHeader.unpack(payload)
        return SourceBlock(index, header.num_tokens, header.origin, payload)

    def _release(self, keys: Sequence[BlockKey]) -> None:
        for key in keys:
            self.leased[key] -= 1
            if not self.leased[key]:
                del self.leased[key]
        self._notify()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


async def _set_before(event: asyncio.Event, deadline: float) -> bool:
    try:
        async with asyncio.timeout_at(deadline):
            await event.wait()
    except TimeoutError:
        return False
    return True
