"""An SSD's log in memory, one label for a payload. Its records end up where those of the real one would."""

from collections import deque
from dataclasses import dataclass, field

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.records import Location, Record


@dataclass
class FakeDisk:
    num_segments: int
    records_per_segment: int
    stored: dict[Location, tuple[Record, BlockKey]] = field(default_factory=dict)  # with what the slot held

    def __post_init__(self) -> None:
        self._free = deque(range(self.num_segments))
        self._places: deque[Location] = deque()

    def append(self, record: Record, content: BlockKey) -> Location:
        if not self._places:
            segment = self._free.popleft()
            self._places.extend(Location(segment, place, 1) for place in range(self.records_per_segment))
        location = self._places.popleft()
        self.stored[location] = record, content
        return location

    def read(self, location: Location) -> tuple[Record, BlockKey]:
        return self.stored[location]

    def drop(self, segment: int) -> None:
        assert segment not in self._free
        self.stored = {location: entry for location, entry in self.stored.items() if location.segment != segment}
        self._free.append(segment)
