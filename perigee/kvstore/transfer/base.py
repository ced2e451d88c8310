"""What moving blocks between store nodes looks like, whatever moves the bytes."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.errors import StoreError


class TransferFailed(StoreError):
    """The link to a peer broke, or never came to be. What was received before stands; the rest can be pulled again."""


class PeerRefused(TransferFailed):
    """The peer, or we, want nothing to do with the other: a wrong secret, another protocol, too many connections."""


class ReaderTooSlow(TransferFailed):
    """A peer held leases beyond their deadline and was cut off."""


class BackendMissing(StoreError):
    """A transfer backend was asked for that is not installed here, or does not load."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A block to pull. `into` is a whole slot of the receiver's arena; `index` is the caller's name for the block."""

    index: int
    key: BlockKey
    into: memoryview


@dataclass(frozen=True, slots=True)
class Received:
    """The block of `index` lies whole in its slot: header and xxh3-64 checksum were verified."""

    index: int
    num_tokens: int
    origin: int


@dataclass(frozen=True, slots=True)
class SourceBlock:
    """A leased block of the serving node. `index` is its key's in the request, `payload` the whole slot it lies in."""

    index: int
    num_tokens: int
    origin: int
    payload: memoryview


class Transfer(Protocol):
    """The pulling side; a node has one. All of it is for one event loop."""

    @property
    def corrupt_received_total(self) -> int:
        """Blocks that came but were not what their header and checksum say."""

    def pull(self, peer: str, wanted: Sequence[Wanted], wait_s: float) -> AsyncGenerator[Received, None]:
        """Yields blocks as they arrive, in any order, waiting up to `wait_s` seconds for those not committed yet.

        Ends when all came or are missing; a corrupt block is missing. `peer` is its `Member.transfer_address`. Slots
        are written into only until the generator ends or is closed; closing it (`contextlib.aclosing`) cancels the
        rest. Raises TransferFailed if the link broke: what was yielded stands, and the caller may pull the rest again.
        """

    async def close(self) -> None:
        """Ends all links; who still pulls gets TransferFailed."""


class BlockSource(Protocol):
    """What the serving side asks of its own node's store."""

    def lease(self, keys: Sequence[BlockKey], wait_s: float) -> AsyncGenerator[tuple[SourceBlock, ...], None]:
        """Leases each of `keys`, all different, and yields them in batches as they are committed, each block once.

        Ends when all came or `wait_s` seconds are over. All blocks that it yielded stay leased, and their slots keep
        their content, until the generator is closed, however late that is: the caller has a deadline for that, at which
        it cuts its reader off before it closes the generator. Closing it ends the leases at once.
        """
