"""How many blocks of an arena are pinned: those that somebody leases, and all their ancestors there."""

from collections.abc import Mapping

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.holdings import Block


class PinCounts:
    """Over the resident `blocks`, which the index fills. Both ways cost O(1) amortized along a chain."""

    def __init__(self, blocks: Mapping[BlockKey, Block]) -> None:
        self.num_pinned = 0
        self._blocks = blocks
        # By parent key, whether or not the parent itself is resident; no zeros are kept.
        self._pinned_children: dict[BlockKey, int] = {}

    def is_above_pinned(self, key: BlockKey) -> bool:
        """Whether a child of the block is pinned, and so the block is, if it is resident."""
        return key in self._pinned_children

    def pin(self, block: Block) -> None:
        """`block` just became pinned, and with it those ancestors that were not."""
        pinned: Block | None = block
        while pinned:
            self.num_pinned += 1
            siblings = self._pinned_children.get(pinned.parent, 0)
            self._pinned_children[pinned.parent] = siblings + 1
            parent = self._blocks.get(pinned.parent)
            pinned = parent if parent and not siblings and not parent.leases else None

    def unpin(self, block: Block) -> None:
        """The reverse of `pin`."""
        unpinned: Block | None = block
        while unpinned:
            self.num_pinned -= 1
            siblings = decrement(self._pinned_children, unpinned.parent)
            parent = self._blocks.get(unpinned.parent)
            unpinned = parent if parent and not siblings and not parent.leases else None


def decrement(counts: dict[BlockKey, int], key: BlockKey) -> int:
    """Counts one down and keeps no zero; returns what is left."""
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]
    return left
