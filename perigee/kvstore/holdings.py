"""What is held of an arena, and by whom."""

from dataclasses import dataclass
from typing import NamedTuple

from perigee.kvstore.blocks import BlockKey


class GroupId(NamedTuple):
    """Leases and reservations that end together: a group of a connection, or both with the connection."""

    connection: int
    group: int


NODE = 0
"""The connection of what the node itself holds: slots that blocks are read into, blocks being written, pins."""


@dataclass(slots=True, eq=False)
class Block:
    """A committed block. `leases` counts the groups that hold it, `uses` how often one came to.

    While it is in the arena, `above` is the block of its parent, if that is there, too; `children` counts the blocks
    there of which it is the parent, and `pinned_children` those of them that are pinned.
    """

    key: BlockKey
    parent: BlockKey
    slot: int
    num_tokens: int
    origin: int
    leases: int = 0
    uses: int = 0
    above: "Block | None" = None
    children: int = 0
    pinned_children: int = 0
