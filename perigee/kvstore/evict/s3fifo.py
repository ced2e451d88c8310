"""S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP '23)."""

import itertools
from dataclasses import dataclass

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.evict.ranked import RankedBlocks

_SMALL_SHARE = 0.1
"""Of all blocks, those that the small queue may hold before it gives up its own (section 4.1)."""
_MAX_USES = 3
"""Uses are counted in two bits."""


@dataclass(slots=True)
class _Entry:
    """A resident block. `ticket` is its place in its queue, `uses` those since it came into it."""

    ticket: int
    in_main: bool
    partial: bool = False
    uses: int = 0


class S3FIFO:
    """New blocks pass through a small queue; those used more than once there, or evicted not long ago, go to the main.

    The queues hold all blocks, also those that may not go; a victim is the first of its queue that may. Partial blocks
    are the first of their queue.
    """

    def __init__(self) -> None:
        self._tickets = itertools.count()
        self._entries: dict[BlockKey, _Entry] = {}
        self._num_small = 0
        self._small = RankedBlocks()
        self._main = RankedBlocks()
        self._ghosts: dict[BlockKey, None] = {}  # evicted from the small queue, oldest first; as many as blocks

    def use(self, key: BlockKey, now: float, parent: BlockKey) -> None:
        if entry := self._entries.get(key):
            entry.uses = min(entry.uses + 1, _MAX_USES)
            return
        in_main = key in self._ghosts
        self._ghosts.pop(key, None)
        self._entries[key] = _Entry(next(self._tickets), in_main)
        self._num_small += not in_main

    def allow(self, key: BlockKey, partial: bool) -> None:
        entry = self._entries[key]
        entry.partial = partial
        self._enqueue(key, entry)

    def forbid(self, key: BlockKey) -> None:
        if entry := self._entries.get(key):
            (self._main if entry.in_main else self._small).discard(key)

    def pop(self) -> BlockKey | None:
        while key := self._first():
            entry = self._entries[key]
            if self._is_kept(entry):
                entry.ticket = next(self._tickets)
                self._enqueue(key, entry)
            else:
                self._forget(key, entry)
                return key
        return None

    def remove(self, key: BlockKey) -> None:
        self.forbid(key)
        self._forget(key, self._entries[key])

    def _first(self) -> BlockKey | None:
        """Of the queue whose turn it is, or of the other if none may go there."""
        small_is_full = self._num_small >= _SMALL_SHARE * len(self._entries)
        if self._small and (small_is_full or not self._main):
            return self._small.pop()
        return self._main.pop()

    def _is_kept(self, entry: _Entry) -> bool:
        """Whether a block at the head of its queue goes on to the end of the main queue. Each time costs it uses."""
        if entry.in_main:
            entry.uses -= 1
            return entry.uses >= 0
        if entry.uses <= 1:
            return False
        entry.in_main, entry.uses = True, 0
        self._num_small -= 1
        return True

    def _enqueue(self, key: BlockKey, entry: _Entry) -> None:
        (self._main if entry.in_main else self._small).add(key, (not entry.partial, entry.ticket))

    def _forget(self, key: BlockKey, entry: _Entry) -> None:
        del self._entries[key]
        if not entry.in_main:
            self._num_small -= 1
            self._ghosts[key] = None
        while len(self._ghosts) > len(self._entries):
            del self._ghosts[next(iter(self._ghosts))]
