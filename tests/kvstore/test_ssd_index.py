"""What the SSD tier takes, keeps and gives up; and the index beside a plain model of it, under any operations."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from perigee.kvstore.blocks import PREFILL, BlockKey
from perigee.kvstore.errors import CorruptRecord
from perigee.kvstore.records import Location, Record
from perigee.kvstore.ssd_index import WORTHWHILE_RETURN_RATE, SsdIndex
from tests.kvstore import ssd_log
from tests.kvstore.keys import ROOT, key
from tests.kvstore.ssd_log import OpenLog

PER_SEGMENT = 4


def record(name: str) -> Record:
    return Record(key(name), ROOT, 5, PREFILL)


def at(place: int) -> Location:
    """The place of that number in the log."""
    segment, position = divmod(place, PER_SEGMENT)
    return Location(segment, 4096 + 8192 * position, 8192)


def write(index: SsdIndex, name: str, place: int, uses: int = 2) -> None:
    assert index.begin_write(record(name), uses)
    assert index.written(key(name), at(place))


def filled(num_segments: int, num_filled: int, uses: int = 2) -> SsdIndex:
    """With blocks called by the number of their place in the first segments."""
    index = SsdIndex(num_segments, PER_SEGMENT)
    for place in range(num_filled * PER_SEGMENT):
        write(index, str(place), place, uses)
    return index


def read(index: SsdIndex, name: str) -> None:
    location = index.begin_read(key(name))
    assert location
    index.end_read(location)


def give_up(index: SsdIndex) -> int:
    victim = index.victim_segment()
    assert victim is not None
    index.drop_segment(victim)
    index.recycled(victim)
    return victim


def unlearn_returns(index: SsdIndex) -> None:
    """Blocks used once never come back, until the index does not want them any more."""
    for number in range(10_000):
        if not index.wants(key(f"never{number}"), uses=1):
            return
        if index.victim_segment() is not None:
            give_up(index)
        write(index, f"never{number}", number % (index.num_segments * PER_SEGMENT), uses=1)
    raise AssertionError("it takes them forever")


# ---- admission -------------------------------------------------------------------------------------------------------


def test_at_first_every_full_block_is_wanted_and_of_partial_ones_those_used_twice() -> None:
    index = SsdIndex(4, PER_SEGMENT)
    assert index.wants(key("a"), uses=1)
    assert not index.wants(key("b"), uses=1, partial=True)
    assert index.wants(key("c"), uses=2, partial=True)


def test_a_refused_block_is_wanted_the_second_time() -> None:
    index = SsdIndex(4, PER_SEGMENT)
    assert [index.wants(key("a"), uses=1, partial=True) for _ in range(2)] == [False, True]


def test_what_is_there_or_being_written_is_not_wanted_again() -> None:
    index = SsdIndex(4, PER_SEGMENT)
    assert index.begin_write(record("a"), 5)
    assert not index.wants(key("a"), uses=5)
    assert not index.begin_write(record("a"), 5)
    index.written(key("a"), at(0))
    assert not index.wants(key("a"), uses=5)
    assert not index.begin_write(record("a"), 5)


def test_blocks_used_once_are_refused_when_such_blocks_do_not_return_and_taken_again_when_they_do() -> None:
    index = SsdIndex(4, PER_SEGMENT)
    unlearn_returns(index)
    assert index.return_rate < WORTHWHILE_RETURN_RATE
    assert not index.wants(key("once"), uses=1)
    assert index.wants(key("twice"), uses=2)
    for number in range(1000):
        name = f"returning{number}"
        if index.wants(key(name), uses=1):
            return
        assert index.wants(key(name), uses=1)
        if not index.room:
            give_up(index)
        assert index.begin_write(record(name), uses=1)
        index.abandon(key(name))
    raise AssertionError("it refuses them forever")


def test_blocks_that_are_read_before_they_are_given_up_keep_the_rate_up() -> None:
    index = SsdIndex(2, PER_SEGMENT)
    for number in range(500):
        if index.victim_segment() is not None:
            give_up(index)
        assert index.wants(key(str(number)), uses=1)
        write(index, str(number), number % 8, uses=1)
        read(index, str(number))
    assert index.return_rate == 1


def test_refused_keys_are_remembered_up_to_the_size_of_the_tier() -> None:
    index = SsdIndex(2, PER_SEGMENT)
    names = [f"p{number}" for number in range(9)]
    assert not any(index.wants(key(name), uses=1, partial=True) for name in names)
    assert not index.wants(key(names[0]), uses=1, partial=True)
    assert index.wants(key(names[-1]), uses=1, partial=True)


# ---- eviction --------------------------------------------------------------------------------------------------------


def test_no_segment_goes_while_one_is_free() -> None:
    assert filled(3, 2).victim_segment() is None


def test_the_segment_used_least_goes_first() -> None:
    index = filled(3, 3)
    read(index, "0")
    read(index, str(2 * PER_SEGMENT))
    assert index.victim_segment() == 1
    assert sorted(index.drop_segment(1)) == sorted(key(str(place)) for place in range(PER_SEGMENT, 2 * PER_SEGMENT))


def test_of_equals_the_oldest_goes_first() -> None:
    assert filled(3, 3).victim_segment() == 0


def test_what_was_hot_long_ago_goes_before_what_was_used_lately() -> None:
    index = filled(4, 4)
    for _ in range(3):
        read(index, "0")
    victims = []
    for turn in range(10):
        victims.append(give_up(index))
        for position in range(PER_SEGMENT):
            write(index, f"turn{turn}-{position}", victims[-1] * PER_SEGMENT + position)
    assert victims[0] != 0
    assert 0 in victims


def test_forgotten_blocks_make_their_segment_worth_less() -> None:
    index = filled(3, 3)
    assert index.forget(key(str(2 * PER_SEGMENT)))
    assert not index.forget(key(str(2 * PER_SEGMENT)))
    assert index.victim_segment() == 2


def test_a_segment_that_is_read_is_not_given_up() -> None:
    index = filled(2, 2, uses=1)
    location = index.begin_read(key("0"))
    assert location == at(0)
    assert index.num_reading == 1
    for _ in range(10):
        read(index, str(PER_SEGMENT))
    assert index.victim_segment() == 1
    index.begin_read(key(str(PER_SEGMENT)))
    assert index.victim_segment() is None
    with pytest.raises(ValueError, match="segment: 0; it is being read"):
        index.drop_segment(0)
    index.forget(key("0"))
    index.end_read(location)
    assert index.victim_segment() == 0


def test_a_segment_with_writes_under_way_is_not_given_up() -> None:
    index = SsdIndex(1, PER_SEGMENT)
    for place in range(PER_SEGMENT):
        assert index.begin_write(record(str(place)), 2)
    assert not index.begin_write(record("more"), 2)
    for place in range(PER_SEGMENT):
        assert index.victim_segment() is None
        index.written(key(str(place)), at(place))
    assert index.victim_segment() == 0


def test_one_victim_at_a_time_is_enough_until_it_is_recycled() -> None:
    index = filled(3, 3)
    index.drop_segment(0)
    assert (index.victim_segment(), index.room) == (None, 0)
    index.recycled(0)
    assert index.room == PER_SEGMENT


def test_a_block_forgotten_while_it_is_written_never_appears_but_takes_its_place() -> None:
    index = SsdIndex(1, PER_SEGMENT)
    assert index.begin_write(record("a"), 2)
    assert not index.forget(key("a"))
    assert not index.begin_write(record("a"), 2)
    assert not index.written(key("a"), at(0))
    assert (index.lookup(key("a")), index.room) == (None, PER_SEGMENT - 1)


def test_recovered_blocks_are_there_and_their_segments_count_as_full() -> None:
    index = SsdIndex(3, PER_SEGMENT, [(record("a"), at(4)), (record("b"), at(0))])
    assert index.lookup(key("a")) == record("a")
    assert index.room == PER_SEGMENT
    write(index, "c", 8)
    assert index.victim_segment() == 1
    assert index.drop_segment(1) == [key("a")]


def test_a_tier_that_is_off_tells_what_it_lost_and_takes_the_ends_of_what_was_under_way() -> None:
    index = filled(3, 1)
    reading = index.begin_read(key("0"))
    assert reading
    for name in ("x", "y"):
        assert index.begin_write(record(name), 2)
    assert sorted(index.switch_off()) == sorted(key(str(place)) for place in range(PER_SEGMENT))
    index.end_read(reading)
    index.abandon(key("x"))
    index.recycled(2)
    assert not index.written(key("y"), at(5))
    assert not index.wants(key("z"), uses=9)
    assert not index.begin_write(record("z"), uses=9)
    assert index.begin_read(key("0")) is None
    assert (index.victim_segment(), len(index), index.inconsistencies()) == (None, 0, [])


# ---- beside the log --------------------------------------------------------------------------------------------------


def test_index_and_log_agree_on_room_through_many_rounds_and_restarts(open_log: OpenLog) -> None:
    chance = random.Random(3)
    for life in range(4):
        log = open_log(num_segments=4)
        index = SsdIndex(log.num_segments, log.layout.records_per_segment, log.recovered)
        names = {key(f"{past}/{turn}"): f"{past}/{turn}" for past in range(life + 1) for turn in range(60)}
        assert bool(index.keys()) == (life > 0)
        for turn in range(60):
            if (victim := index.victim_segment()) is not None:
                index.drop_segment(victim)
                log.drop(victim)
                index.recycled(victim)
            name = f"{life}/{turn}"
            assert index.begin_write(record(name), uses=2)
            assert index.written(key(name), ssd_log.append(log, name))
            assert index.room == log.room
            some = chance.choice(sorted(index.keys()))
            location = index.begin_read(some)
            assert location
            assert ssd_log.read(log, names[some], location) == ssd_log.payload(names[some])
            index.end_read(location)
        assert index.inconsistencies() == []
        log.close()


def test_reads_of_a_location_that_was_given_up_fail(open_log: OpenLog) -> None:
    log = open_log(num_segments=1)
    index = SsdIndex(1, PER_SEGMENT)
    for name in "abcd":
        assert index.begin_write(record(name), uses=2)
        index.written(key(name), ssd_log.append(log, name))
    location = index.begin_read(key("a"))
    assert location
    index.end_read(location)
    index.drop_segment(0)
    log.drop(0)
    with pytest.raises(CorruptRecord):
        ssd_log.read(log, "a", location)


# ---- beside a model --------------------------------------------------------------------------------------------------

NUM_SEGMENTS = 4
names = st.integers(0, 24).map(str)


class IndexAndModel(RuleBasedStateMachine):
    """The model is a log: which places are taken, and a plain dictionary of where the blocks are."""

    def __init__(self) -> None:
        super().__init__()
        self.index = SsdIndex(NUM_SEGMENTS, PER_SEGMENT)
        self.blocks: dict[BlockKey, Location] = {}
        self.writing: dict[BlockKey, bool] = {}  # False: forgotten meanwhile
        self.places: dict[BlockKey, Location] = {}  # of the writes that the log has begun
        self.reading: list[Location] = []
        self.dropped: list[int] = []
        self.free = list(range(NUM_SEGMENTS))
        self.filling: list[Location] = []  # what is left of the segment that is being filled

    # ---- operations ----------------------------------------------------------------------------------------------

    @rule(name=names, uses=st.integers(1, 3), partial=st.booleans())
    def ask(self, name: str, uses: int, partial: bool) -> None:
        wanted = self.index.wants(key(name), uses, partial)
        known = key(name) in self.blocks or key(name) in self.writing
        assert not (wanted and known)
        assert wanted or known or uses == 1

    @rule(name=names, uses=st.integers(1, 3))
    def begin_write(self, name: str, uses: int) -> None:
        known = key(name) in self.blocks or key(name) in self.writing
        began = self.index.begin_write(record(name), uses)
        assert began == (not known and self._room() > 0)
        if began:
            self.writing[key(name)] = True

    @precondition(lambda self: self.writing.keys() - self.places.keys())
    @rule(data=st.data(), abandoned=st.booleans())
    def append_or_abandon(self, data: st.DataObject, abandoned: bool) -> None:
        chosen = data.draw(st.sampled_from(sorted(self.writing.keys() - self.places.keys())))
        if abandoned:
            self.index.abandon(chosen)
            del self.writing[chosen]
        else:
            self.places[chosen] = self._take_place()

    @precondition(lambda self: self.places)
    @rule(data=st.data())
    def written(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(sorted(self.places)))
        location, is_wanted = self.places.pop(chosen), self.writing.pop(chosen)
        assert self.index.written(chosen, location) == is_wanted
        if is_wanted:
            self.blocks[chosen] = location

    @rule(name=names)
    def begin_read(self, name: str) -> None:
        location = self.index.begin_read(key(name))
        assert location == self.blocks.get(key(name))
        if location:
            self.reading.append(location)

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def end_read(self, data: st.DataObject) -> None:
        location = data.draw(st.sampled_from(self.reading))
        self.reading.remove(location)
        self.index.end_read(location)

    @rule(name=names)
    def forget(self, name: str) -> None:
        assert self.index.forget(key(name)) == (self.blocks.pop(key(name), None) is not None)
        if key(name) in self.writing:
            self.writing[key(name)] = False

    @rule()
    def give_up(self) -> None:
        victim = self.index.victim_segment()
        may_go = self._full() - {location.segment for location in self.reading}
        needed = self._room() + len(self.dropped) * PER_SEGMENT < PER_SEGMENT
        assert victim in may_go if needed and may_go else victim is None
        if victim is not None:
            gone = {k for k, location in self.blocks.items() if location.segment == victim}
            assert sorted(self.index.drop_segment(victim)) == sorted(gone)
            self.blocks = {k: location for k, location in self.blocks.items() if k not in gone}
            self.dropped.append(victim)

    @precondition(lambda self: self.dropped)
    @rule()
    def recycle(self) -> None:
        self.index.recycled(self.dropped[0])
        self.free.append(self.dropped.pop(0))

    # ---- the model -----------------------------------------------------------------------------------------------

    def _room(self) -> int:
        return len(self.free) * PER_SEGMENT + len(self.filling) - len(self.writing.keys() - self.places.keys())

    def _take_place(self) -> Location:
        if not self.filling:
            first = self.free.pop(0) * PER_SEGMENT
            self.filling = [at(place) for place in range(first, first + PER_SEGMENT)]
        return self.filling.pop(0)

    def _full(self) -> set[int]:
        """Segments of which every place was written."""
        open_ones = {location.segment for location in (*self.filling, *self.places.values())}
        return set(range(NUM_SEGMENTS)) - open_ones - set(self.free) - set(self.dropped)

    # ---- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def they_agree(self) -> None:
        assert self.index.keys() == self.blocks.keys()
        assert all(self.index.lookup(k) for k in self.blocks)
        assert self.index.room == self._room()
        assert (self.index.num_writing, self.index.num_reading) == (len(self.writing), len(self.reading))

    @invariant()
    def it_finds_no_fault_with_itself(self) -> None:
        assert self.index.inconsistencies() == []
        assert 0 <= self.index.return_rate <= 1


IndexAndModel.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestIndexAgainstModel = IndexAndModel.TestCase
