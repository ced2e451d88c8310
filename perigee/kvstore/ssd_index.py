"""Which block is where on SSD, what is worth writing there, and which segment to give up: a synchronous state machine.

Admission: a block that was used twice is worth a write, be it twice in DRAM, or once there and once before when it was
refused here. A block used once is worth it as long as such blocks return often enough. That rate is learned: a block
that was written on its first use is read before its segment is given up, or it is not; a refused one comes back while
it is remembered, or it does not. Partial blocks need the second use: their keys stand for their tokens alone.

Eviction: the unit is a segment, so that writes stay sequential. A record is worth its uses, on top of an inflation
level as of the last one; the victim is the segment whose live records are worth the least together, and the level rises
to their mean (GreedyDual, Young 1994, over segments). So what is not used ages, and records forgotten count nothing.
Hot records of a victim are not moved. A hit promotes a block to DRAM, so the hot ones are there already, and come back
to a young segment when DRAM lets go of them.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.records import Location, Record

SEEN_TWICE = 2
# Prefill of a block takes tens of times as long as its write. Where fewer than this return, as in a tier that is small
# for the distances of reuse, refusing some leaves room for the others, and hits rise.
WORTHWHILE_RETURN_RATE = 0.05
_RATE_STEP = 1 / 256  # the weight of one block's fate in the learned rate
_MAX_REMEMBERED = 1 << 16  # refused keys, some 200 bytes each


@dataclass(frozen=True, slots=True)
class _Write:
    record: Record
    uses: int
    is_trial: bool  # on its first use: its fate counts in the return rate


@dataclass(slots=True)
class _Entry:
    record: Record
    location: Location
    uses: int
    worth: float
    is_trial: bool


@dataclass(slots=True)
class _Segment:
    """`filled` counts the places that were written; when all are, and nobody reads, the segment may go."""

    filled: int = 0
    readers: int = 0
    worth: float = 0.0
    keys: set[BlockKey] = field(default_factory=set)


class SsdIndex:
    """The blocks in a log of `num_segments` segments of `records_per_segment` records each.

    Everything here is owned and filled by the index alone. It counts places as the log does: to each `begin_write` that
    answers yes belongs one append to the log and then `written`, or an `abandon`; an append that fails ends the tier.

    A segment's life: filled by writes, named by `victim_segment`, emptied by `drop_segment`, dropped in the log,
    `recycled`. Which blocks enter or leave the tier is told by return values, for the caller to publish.
    """

    def __init__(
        self, num_segments: int, records_per_segment: int, recovered: Iterable[tuple[Record, Location]] = ()
    ) -> None:
        """`recovered` are the log's, oldest first. A segment that holds any of them counts as filled."""
        self.num_segments = num_segments
        self.records_per_segment = records_per_segment
        self.is_off = False
        self.return_rate = 1.0  # of blocks used once; until some had the time not to return, all are welcome
        # One segment in reserve keeps writes going while the next victim is dropped; more where there are many.
        self._reserve = max(1, num_segments // 32) * records_per_segment
        self._max_remembered = min(num_segments * records_per_segment, _MAX_REMEMBERED)
        self._level = 0.0
        self._entries: dict[BlockKey, _Entry] = {}
        self._segments: dict[int, _Segment] = {}  # by age: those written to since they were last recycled
        self._dropped: set[int] = set()  # emptied here, not yet recycled
        self._writing: dict[BlockKey, _Write | None] = {}  # None: forgotten meanwhile
        self._refused: dict[BlockKey, bool] = {}  # to whether it is partial, oldest first
        for record, location in recovered:
            segment = self._segments.setdefault(location.segment, _Segment(filled=records_per_segment))
            self._insert(segment, _Write(record, uses=1, is_trial=False), location)
        self._room = (num_segments - len(self._segments)) * records_per_segment

    # ---- what is here --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> Collection[BlockKey]:
        """Of all blocks that can be read."""
        return self._entries.keys()

    def lookup(self, key: BlockKey) -> Record | None:
        """The block's record, if it can be read. Extends nothing."""
        entry = self._entries.get(key)
        return entry.record if entry else None

    @property
    def room(self) -> int:
        """Records that can be written before a segment must be recycled."""
        return self._room

    @property
    def num_writing(self) -> int:
        return len(self._writing)

    @property
    def num_reading(self) -> int:
        return sum(segment.readers for segment in self._segments.values())

    # ---- writing -------------------------------------------------------------------------------------------------

    def wants(self, key: BlockKey, uses: int, partial: bool = False) -> bool:
        """Whether a block is worth a write that leaves DRAM and was used there `uses` times, the commit included.

        To be asked once each time that a block leaves: a key that is refused is remembered, and welcome the next time.
        """
        if self.is_off or key in self._entries or key in self._writing:
            return False
        if uses >= SEEN_TWICE or key in self._refused:
            return True
        if not partial and self.return_rate >= WORTHWHILE_RETURN_RATE:
            return True
        self._refuse(key, partial)
        return False

    def begin_write(self, record: Record, uses: int) -> bool:
        """Takes the place of one record. False, with nothing changed, if there is none or the block has one already."""
        key = record.key
        if self.is_off or not self._room or key in self._entries or key in self._writing:
            return False
        was_partial = self._refused.pop(key, None)
        if was_partial is False:
            self._learn(returned=True)
        self._room -= 1
        self._writing[key] = _Write(record, uses, is_trial=uses < SEEN_TWICE and was_partial is None)
        return True

    def written(self, key: BlockKey, location: Location) -> bool:
        """The record is in the log. Whether the block can be read from now on: not if it was forgotten meanwhile."""
        if self.is_off:
            return False
        write = self._writing.pop(key)
        segment = self._segments.setdefault(location.segment, _Segment())
        segment.filled += 1
        if write:
            self._insert(segment, write, location)
        return write is not None

    def abandon(self, key: BlockKey) -> None:
        """The write was never started."""
        if not self.is_off:
            del self._writing[key]
            self._room += 1

    # ---- reading -------------------------------------------------------------------------------------------------

    def begin_read(self, key: BlockKey) -> Location | None:
        """Where to read the block, None if it is not here. Its segment stays until `end_read`."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.is_trial:
            entry.is_trial = False
            self._learn(returned=True)
        segment = self._segments[entry.location.segment]
        segment.readers += 1
        entry.uses += 1
        segment.worth -= entry.worth
        entry.worth = self._level + entry.uses
        segment.worth += entry.worth
        return entry.location

    def end_read(self, location: Location) -> None:
        """The read ended, however it did."""
        if not self.is_off:
            self._segments[location.segment].readers -= 1

    def forget(self, key: BlockKey) -> bool:
        """Gives up one block, such as a corrupt one. Whether it could be read before."""
        if key in self._writing:
            self._writing[key] = None
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        segment = self._segments[entry.location.segment]
        segment.keys.remove(key)
        segment.worth -= entry.worth
        return True

    # ---- giving up -----------------------------------------------------------------------------------------------

    def victim_segment(self) -> int | None:
        """The segment to drop next; None if there is room enough, or will be, or no segment may go now."""
        coming = len(self._dropped) * self.records_per_segment
        if self.is_off or self._room + coming >= self._reserve:
            return None
        candidates = (number for number, segment in self._segments.items() if self._may_go(segment))
        return min(candidates, key=lambda number: self._segments[number].worth, default=None)

    def drop_segment(self, number: int) -> list[BlockKey]:
        """Forgets all blocks of a victim; returns their keys. It can be dropped in the log now."""
        segment = self._segments[number]
        if not self._may_go(segment):
            raise ValueError(f"segment: {number}; it is being read, or not full yet")
        del self._segments[number]
        self._dropped.add(number)
        self._level = max(self._level, segment.worth / self.records_per_segment)
        for key in segment.keys:
            if self._entries.pop(key).is_trial:
                self._learn(returned=False)
        return list(segment.keys)

    def recycled(self, number: int) -> None:
        """The log dropped the segment: its places can be written to again."""
        if not self.is_off:
            self._dropped.remove(number)
            self._room += self.records_per_segment

    def switch_off(self) -> list[BlockKey]:
        """The tier failed: it wants, has and takes nothing any more. Returns the keys of all blocks that it had."""
        keys = list(self._entries)
        self.is_off = True
        self._room = 0
        for state in (self._entries, self._segments, self._dropped, self._writing, self._refused):
            state.clear()
        return keys

    def inconsistencies(self) -> list[str]:
        """What is wrong with the index, nothing if all is well. Takes time in proportion to its size."""
        wrong = []
        if {k for segment in self._segments.values() for k in segment.keys} != self._entries.keys():
            wrong.append("segments and blocks do not name the same keys")
        for number, segment in self._segments.items():
            entries = [self._entries[key] for key in segment.keys]
            if any(entry.location.segment != number for entry in entries):
                wrong.append(f"segment {number} names a block that is elsewhere")
            if not len(entries) <= segment.filled <= self.records_per_segment or segment.readers < 0:
                wrong.append(f"segment {number}: {len(entries)} live, {segment.filled} filled, {segment.readers} read")
        unfilled = sum(self.records_per_segment - segment.filled for segment in self._segments.values())
        untouched = self.num_segments - len(self._segments) - len(self._dropped)
        places = untouched * self.records_per_segment + unfilled
        if not self.is_off and self._room + len(self._writing) != places:
            wrong.append(f"{self._room} free and {len(self._writing)} taken of {places} places")
        return wrong

    # ---- inside --------------------------------------------------------------------------------------------------

    def _insert(self, segment: _Segment, write: _Write, location: Location) -> None:
        key, worth = write.record.key, self._level + write.uses
        self._entries[key] = _Entry(write.record, location, write.uses, worth, write.is_trial)
        segment.keys.add(key)
        segment.worth += worth

    def _may_go(self, segment: _Segment) -> bool:
        return segment.filled == self.records_per_segment and not segment.readers

    def _refuse(self, key: BlockKey, partial: bool) -> None:
        self._refused[key] = partial
        if len(self._refused) > self._max_remembered:
            was_partial = self._refused.pop(next(iter(self._refused)))
            if not was_partial:
                self._learn(returned=False)

    def _learn(self, returned: bool) -> None:
        self.return_rate += (returned - self.return_rate) * _RATE_STEP
