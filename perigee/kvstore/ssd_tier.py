"""The SSD tier as a store sees it: what the index of the log decides, as events and as segments to drop."""

from collections.abc import Collection

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.holdings import Block
from perigee.kvstore.messages import BlockEvent, Tier
from perigee.kvstore.records import Location, Record
from perigee.kvstore.ssd_index import SsdIndex


class SsdTier:
    """Follows the log through `index`: every load and spill is begun here and ends here."""

    def __init__(self, index: SsdIndex, block_tokens: int) -> None:
        self._index = index
        self._block_tokens = block_tokens
        self._events: list[BlockEvent] = []

    def __contains__(self, key: BlockKey) -> bool:
        return self._index.lookup(key) is not None

    def __len__(self) -> int:
        return len(self._index)

    @property
    def is_off(self) -> bool:
        return self._index.is_off

    def keys(self) -> Collection[BlockKey]:
        return self._index.keys()

    def take_events(self) -> list[BlockEvent]:
        """What entered the tier and left it since the last call, in order."""
        events, self._events = self._events, []
        return events

    # ---- spills --------------------------------------------------------------------------------------------------

    def begin_spill(self, block: Block) -> bool:
        """Whether a block that leaves the arena is to be written. What is here already is not."""
        is_partial = block.num_tokens < self._block_tokens
        if not self._index.wants(block.key, block.uses, is_partial):
            return False
        return self._index.begin_write(Record(block.key, block.parent, block.num_tokens, block.origin), block.uses)

    def spilled(self, key: BlockKey, location: Location | None) -> None:
        """The write ended; None if it was none."""
        if location is None:
            self._index.abandon(key)
        elif self._index.written(key, location):
            self._events.append(BlockEvent(True, key, Tier.SSD))

    def segments_to_drop(self) -> list[int]:
        """The segments to give up now. Their blocks have left the tier; `dropped` tells when the log has done so."""
        segments = []
        while (segment := self._index.victim_segment()) is not None:
            self._left(self._index.drop_segment(segment))
            segments.append(segment)
        return segments

    def dropped(self, segment: int) -> None:
        self._index.recycled(segment)

    # ---- loads ---------------------------------------------------------------------------------------------------

    def begin_load(self, key: BlockKey) -> tuple[Record, Location]:
        """What to read where. The block is in the tier."""
        record, location = self._index.lookup(key), self._index.begin_read(key)
        assert record is not None and location is not None
        return record, location

    def loaded(self, key: BlockKey, location: Location, came: bool) -> None:
        """A read ended. A block that could not be read is not here any more."""
        self._index.end_read(location)
        if not came:
            self.drop(key)

    def drop(self, key: BlockKey) -> bool:
        """Forgets a block, also one that is being written. Whether it was here."""
        was_here = self._index.forget(key)
        if was_here:
            self._left([key])
        return was_here

    def switch_off(self) -> None:
        """The disk failed: nothing is here, and nothing comes."""
        self._left(self._index.switch_off())

    def _left(self, keys: Collection[BlockKey]) -> None:
        self._events += [BlockEvent(False, key, Tier.SSD) for key in keys]
