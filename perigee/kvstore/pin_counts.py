"""How many blocks of an arena are pinned: those that somebody leases, and all their ancestors there."""

from perigee.kvstore.holdings import Block


class PinCounts:
    """Counts them, and in each block its pinned children. Both ways cost O(1) amortized along a chain."""

    def __init__(self) -> None:
        self.num_pinned = 0

    def pin(self, block: Block) -> None:
        """`block` just became pinned, and with it those ancestors that were not."""
        pinned: Block | None = block
        while pinned:
            self.num_pinned += 1
            pinned = pinned.above
            if pinned:
                pinned.pinned_children += 1
                if pinned.pinned_children > 1 or pinned.leases:
                    return

    def unpin(self, block: Block) -> None:
        """The reverse of `pin`."""
        unpinned: Block | None = block
        while unpinned:
            self.num_pinned -= 1
            unpinned = unpinned.above
            if unpinned:
                unpinned.pinned_children -= 1
                if unpinned.pinned_children or unpinned.leases:
                    return
