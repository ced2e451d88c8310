"""Blocks that may be evicted, in the order of a rank that each has got."""

import heapq
import itertools

from perigee.kvstore.blocks import BlockKey

Rank = tuple[float, ...]


class RankedBlocks:
    """A priority queue of blocks, lowest rank first. Ties fall to what was added first. O(log n) amortized."""

    def __init__(self) -> None:
        self._tickets = itertools.count()
        # The heap keeps entries of blocks that were discarded since; the ticket tells which entry still counts.
        self._current: dict[BlockKey, int] = {}
        self._heap: list[tuple[Rank, int, BlockKey]] = []

    def __len__(self) -> int:
        return len(self._current)

    def add(self, key: BlockKey, rank: Rank) -> None:
        ticket = self._current[key] = next(self._tickets)
        heapq.heappush(self._heap, (rank, ticket, key))
        if len(self._heap) > 2 * len(self._current) + 64:
            self._drop_stale()

    def discard(self, key: BlockKey) -> None:
        self._current.pop(key, None)

    def pop(self) -> BlockKey | None:
        """Takes out the block of the lowest rank."""
        while self._heap:
            _, ticket, key = heapq.heappop(self._heap)
            if self._current.get(key) == ticket:
                del self._current[key]
                return key
        return None

    def _drop_stale(self) -> None:
        self._heap = [entry for entry in self._heap if self._current.get(entry[2]) == entry[1]]
        heapq.heapify(self._heap)
