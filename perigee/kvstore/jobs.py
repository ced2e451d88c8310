"""The I/O that a store asks for. Whoever drives the store carries it out and tells how it ended.

A slot that is in a job is nobody else's until the job has ended, whatever became of those who wanted the block.
"""

from dataclasses import dataclass
from typing import NamedTuple

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.records import Location, Record


@dataclass(frozen=True, slots=True)
class Load:
    """Read the record of `key` at `location` into `slot`. Ends with `Store.loaded`."""

    job: int
    key: BlockKey
    slot: int
    location: Location


@dataclass(frozen=True, slots=True)
class Spill:
    """Append the block in `slot` to the SSD's log. Ends with `Store.spilled`."""

    job: int
    slot: int
    record: Record


@dataclass(frozen=True, slots=True)
class DropSegment:
    """Free a segment of the SSD's log, of which nothing is readable any more. Ends with `Store.dropped`."""

    segment: int


class Expected(NamedTuple):
    """A block that is to come, the slot to receive it in, and the nonce of the slot's reservation."""

    key: BlockKey
    slot: int
    nonce: int


@dataclass(frozen=True, slots=True)
class Pull:
    """Fetch blocks from the node `source`, which may wait `wait_s` seconds for those that are not committed there yet.

    Each that came is told with `Store.pulled`, as it comes, by its place in `expected`; the end with
    `Store.pull_ended`.
    """

    job: int
    source: str
    expected: tuple[Expected, ...]
    wait_s: float


@dataclass(frozen=True, slots=True)
class CancelPull:
    """Nobody waits for what this pull still brings: end it. It ends with `Store.pull_ended`, like any other."""

    job: int


Job = Load | Spill | DropSegment | Pull | CancelPull
