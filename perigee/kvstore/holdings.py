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


@dataclass(slots=True)
class Block:
    """A committed block. `leases` counts the groups that hold it, `uses` how often one came to."""

    key: BlockKey
    parent: BlockKey
    slot: int
    num_tokens: int
    origin: int
    leases: int = 0
    uses: int = 0
