"""What a store node and its clients tell each other, as plain values.

Nothing here changes once it is made. What there is one of for each block of a request is not frozen all the same, for
that makes a dataclass take ten times as long to make.
"""

from dataclasses import dataclass
from enum import IntEnum

from perigee.kvstore.blocks import BlockKey


class Tier(IntEnum):
    """Where a block is kept. The numbers are the wire's."""

    DRAM = 0
    SSD = 1


@dataclass(slots=True)
class LeasedBlock:
    """A committed block that stays where it is until its group is released.

    `index` is its key's in the request, `tier` is where it was found, `remote` tells whether another node had it.
    """

    index: int
    slot: int
    num_tokens: int
    origin: int
    tier: Tier = Tier.DRAM
    remote: bool = False


@dataclass(slots=True)
class Reservation:
    """A slot to write the block of `index` into, and the nonce that proves it at commit."""

    index: int
    slot: int
    nonce: int


@dataclass(frozen=True, slots=True)
class Acquired:
    """The committed prefix of the requested keys, leased, and a reservation for each key after it."""

    leased: tuple[LeasedBlock, ...]
    reserved: tuple[Reservation, ...]


@dataclass(frozen=True, slots=True)
class Fetched:
    """Some of the blocks of a fetch. The last has `done`, and in `missing` the indices of those that did not come."""

    blocks: tuple[LeasedBlock, ...]
    done: bool = False
    missing: tuple[int, ...] = ()


@dataclass(slots=True)
class CommittedBlock:
    """A reserved slot that now holds a whole payload. `origin` is `blocks.PREFILL` or `blocks.DECODE`."""

    slot: int
    nonce: int
    num_tokens: int
    origin: int


@dataclass(slots=True)
class BlockEvent:
    """A block became readable in a tier, or left it."""

    stored: bool
    key: BlockKey
    tier: Tier = Tier.DRAM
