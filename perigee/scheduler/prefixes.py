"""Which store node holds which blocks: key -> bitmask of nodes and tiers."""

from collections.abc import Iterable, Sequence

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.messages import BlockEvent, Tier
from perigee.scheduler.ids import NodeId

_NUM_TIERS = len(Tier)


class PrefixIndex:
    """Every node has one bit per tier, next to each other; a block held in any of its tiers is held by the node."""

    def __init__(self) -> None:
        self._held: dict[BlockKey, int] = {}
        self._position: dict[NodeId, int] = {}  # of a node's lowest bit

    def __len__(self) -> int:
        return len(self._held)

    def apply(self, node: NodeId, events: Iterable[BlockEvent]) -> None:
        """Enters what came to a node and what left it, in order."""
        position = self._position_of(node)
        held = self._held
        for event in events:
            bit = 1 << (position + event.tier)
            mask = held.get(event.key, 0) | bit
            if not event.stored:
                mask ^= bit
            if mask:
                held[event.key] = mask
            else:
                held.pop(event.key, None)

    def forget(self, node: NodeId) -> None:
        """Drops all that is known of a node. Its bits may then serve another. Takes time linear in all blocks."""
        position = self._position.pop(node, None)
        if position is None:
            return
        kept = ~(_all_tiers() << position)
        self._held = {key: mask & kept for key, mask in self._held.items() if mask & kept}

    def match(self, keys: Sequence[BlockKey]) -> dict[NodeId, int]:
        """How many leading keys each known node holds. One step a key, until no node holds the next one."""
        node_at = {1 << position: node for node, position in self._position.items()}
        lengths = dict.fromkeys(self._position, len(keys))
        alive = sum(node_at)
        for index, key in enumerate(keys):
            mask = self._held.get(key, 0)
            still = alive & (mask | mask >> 1)  # a node's lowest bit stands for all its tiers
            if still != alive:
                for bit in _bits(alive ^ still):
                    lengths[node_at[bit]] = index
                alive = still
                if not alive:
                    break
        return lengths

    def _position_of(self, node: NodeId) -> int:
        if node not in self._position:
            taken = set(self._position.values())
            self._position[node] = next(
                position for position in range(0, _NUM_TIERS * (len(taken) + 1), _NUM_TIERS) if position not in taken
            )
        return self._position[node]


def _all_tiers() -> int:
    return (1 << _NUM_TIERS) - 1


def _bits(mask: int) -> Iterable[int]:
    """The single bits of a mask, lowest first."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit
