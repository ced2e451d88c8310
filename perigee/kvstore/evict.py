"""Which block to give up when the arena is full. Time is an argument; nothing here reads a clock.

The index tells a policy of every use of a block, and which blocks may go: those without lease and without resident
children. So children go before their parents under any policy, and a policy only ranks what it is allowed to take.
"""

import heapq
import itertools
from typing import Protocol

from perigee.kvstore.blocks import BlockKey


class EvictionPolicy(Protocol):
    """Ranks the blocks that may be evicted. All methods take O(log n) amortized."""

    def use(self, key: BlockKey, now: float) -> None:
        """The block was committed or leased at `now`, which never decreases."""

    def allow(self, key: BlockKey, partial: bool) -> None:
        """The block may be evicted from here on. It was used before, and is not allowed yet."""

    def forbid(self, key: BlockKey) -> None:
        """The block may not be evicted. No effect if it was not allowed."""

    def pop(self) -> BlockKey | None:
        """Chooses the next victim and forgets it; None if no block may go."""


class LRU:
    """Partial blocks first, then the least recently used. Ties fall to what was allowed first."""

    def __init__(self) -> None:
        self._last_used: dict[BlockKey, float] = {}
        self._tickets = itertools.count()
        # The heap keeps entries of blocks that were forbidden since; the ticket tells which entry still counts.
        self._allowed: dict[BlockKey, int] = {}
        self._heap: list[tuple[bool, float, int, BlockKey]] = []

    def use(self, key: BlockKey, now: float) -> None:
        self._last_used[key] = now

    def allow(self, key: BlockKey, partial: bool) -> None:
        ticket = self._allowed[key] = next(self._tickets)
        heapq.heappush(self._heap, (not partial, self._last_used[key], ticket, key))
        if len(self._heap) > 2 * len(self._allowed) + 64:
            self._drop_stale()

    def forbid(self, key: BlockKey) -> None:
        self._allowed.pop(key, None)

    def pop(self) -> BlockKey | None:
        while self._heap:
            _, _, ticket, key = heapq.heappop(self._heap)
            if self._allowed.get(key) == ticket:
                del self._allowed[key], self._last_used[key]
                return key
        return None

    def _drop_stale(self) -> None:
        self._heap = [entry for entry in self._heap if self._allowed.get(entry[3]) == entry[2]]
        heapq.heapify(self._heap)
