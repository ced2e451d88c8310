"""What the index asks of an eviction policy."""

from typing import Protocol

from perigee.kvstore.blocks import BlockKey


class EvictionPolicy(Protocol):
    """Ranks the blocks that may be evicted. All methods take O(log n) amortized, n being the blocks of the arena."""

    def use(self, key: BlockKey, now: float, parent: BlockKey) -> None:
        """The block, a child of `parent`, was committed or leased at `now`, which never decreases."""

    def allow(self, key: BlockKey, partial: bool) -> None:
        """The block may be evicted from here on. It was used before, and is not allowed yet."""

    def forbid(self, key: BlockKey) -> None:
        """The block may not be evicted. No effect if it was not allowed."""

    def pop(self) -> BlockKey | None:
        """Chooses the next victim, which has left when it is used again; None if no block may go."""

    def remove(self, key: BlockKey) -> None:
        """A block that was allowed leaves like a victim, but it is somebody else's choice."""
