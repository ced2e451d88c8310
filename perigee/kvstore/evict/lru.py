"""Least recently used."""

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.evict.ranked import RankedBlocks


class LRU:
    """Partial blocks first, then the least recently used. Ties fall to what was allowed first."""

    def __init__(self) -> None:
        self._last_used: dict[BlockKey, float] = {}
        self._allowed = RankedBlocks()

    def use(self, key: BlockKey, now: float, parent: BlockKey) -> None:
        self._last_used[key] = now

    def allow(self, key: BlockKey, partial: bool) -> None:
        self._allowed.add(key, (not partial, self._last_used[key]))

    def forbid(self, key: BlockKey) -> None:
        self._allowed.discard(key)

    def pop(self) -> BlockKey | None:
        key = self._allowed.pop()
        if key is not None:
            del self._last_used[key]
        return key

    def remove(self, key: BlockKey) -> None:
        self._allowed.discard(key)
        del self._last_used[key]
