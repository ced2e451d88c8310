"""A node's SSD in virtual time: where the log puts records, and how long reads and writes take."""

from perigee.kvstore.jobs import DropSegment, Load, Spill
from perigee.kvstore.records import Location, Record
from perigee.kvstore.ssd_index import SsdIndex
from perigee.kvstore.ssd_tier import SsdTier
from perigee.replay.simulator.clock import Clock
from perigee.replay.simulator.network import Link

RECORDS_PER_SEGMENT = 64
MIN_SEGMENTS = 8


def records_per_segment(num_records: int) -> int:
    """About as a log of so many records would have."""
    return max(1, min(RECORDS_PER_SEGMENT, num_records // MIN_SEGMENTS))


def ssd_tier(num_records: int, block_tokens: int) -> SsdTier:
    """For so many blocks."""
    records = records_per_segment(num_records)
    return SsdTier(SsdIndex(max(2, num_records // records), records, ()), block_tokens)


class Disk:
    """Loads and spills one after the other, each at the bandwidth of its direction. Segments are dropped at once."""

    def __init__(self, clock: Clock, records_per_segment: int, reads: Link, writes: Link, block_tokens: int) -> None:
        self.reads = reads
        self.writes = writes
        self._clock = clock
        self._per_segment = records_per_segment
        self._block_tokens = block_tokens
        self._records: dict[Location, Record] = {}
        self._free: list[int] = []
        self._num_segments = 0  # that were ever written to
        self._segment, self._filled = -1, records_per_segment

    def load(self, job: Load) -> tuple[float, Record | None]:
        """When the record is read, and what it is."""
        _, ended_at = self.reads.book(self._block_tokens, self._clock.now)
        return ended_at, self._records.get(job.location)

    def spill(self, job: Spill) -> tuple[float, Location]:
        """When the record is written, and where."""
        if self._filled == self._per_segment:
            self._open_segment()
        location = Location(self._segment, self._filled, 1)
        self._filled += 1
        self._records[location] = job.record
        _, ended_at = self.writes.book(self._block_tokens, self._clock.now)
        return ended_at, location

    def drop(self, job: DropSegment) -> None:
        """Its places can be written again."""
        for position in range(self._per_segment):
            self._records.pop(Location(job.segment, position, 1), None)
        self._free.append(job.segment)

    def _open_segment(self) -> None:
        if self._free:
            self._segment = self._free.pop(0)
        else:
            self._segment = self._num_segments
            self._num_segments += 1
        self._filled = 0
