"""Which committed blocks of an arena follow which, and so which of them may go.

A block may go if nobody leases it and no other block there follows it: descendants go first. One is *pinned*, and could
not go even then, while somebody leases it or a descendant.
"""

from collections.abc import Collection

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.evict import EvictionPolicy
from perigee.kvstore.holdings import Block
from perigee.kvstore.pin_counts import PinCounts


class Lineage:
    """Fills what blocks say of their parents and children, and tells the policy which may be evicted; also whether they
    are partial, of fewer than `block_tokens` tokens.
    """

    def __init__(self, policy: EvictionPolicy, block_tokens: int) -> None:
        self._policy = policy
        self._block_tokens = block_tokens
        self._pins = PinCounts()
        self._parentless: dict[BlockKey, dict[BlockKey, Block]] = {}  # by the parent, which is not here

    @property
    def num_pinned(self) -> int:
        return self._pins.num_pinned

    def enter(self, block: Block, above: Block | None) -> None:
        """`block` came, after its parent or before it."""
        block.above = above
        if above is None:
            self._parentless.setdefault(block.parent, {})[block.key] = block
        else:
            above.children += 1
            if above.children == 1 and not above.leases:
                self._policy.forbid(above.key)
        if below := self._parentless.pop(block.key, None):
            self._adopt(block, below.values())

    def leave(self, block: Block) -> None:
        """`block`, without lease or children, went."""
        above, block.above = block.above, None
        if above is None:
            self._leave_parentless(block)
        else:
            above.children -= 1
            if not above.children and not above.leases:
                self._allow(above)

    def lease(self, block: Block) -> None:
        """`block` has its first lease."""
        if not block.children:  # else it may not be evicted anyway
            self._policy.forbid(block.key)
        if not block.pinned_children:
            self._pins.pin(block)

    def unlease(self, block: Block) -> None:
        """`block` has no lease any more."""
        if not block.pinned_children:
            self._pins.unpin(block)
            if not block.children:
                self._allow(block)

    def _adopt(self, block: Block, children: Collection[Block]) -> None:
        """They were here before their parent."""
        for child in children:
            child.above = block
        block.children = len(children)
        block.pinned_children = sum(child.leases > 0 or child.pinned_children > 0 for child in children)
        if block.pinned_children:
            self._pins.pin(block)

    def _leave_parentless(self, block: Block) -> None:
        siblings = self._parentless[block.parent]
        del siblings[block.key]
        if not siblings:
            del self._parentless[block.parent]

    def _allow(self, block: Block) -> None:
        """It has neither leases nor children any more."""
        self._policy.allow(block.key, partial=block.num_tokens < self._block_tokens)
