"""The segment log on a real file system."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from perigee.kvstore.blocks import PREFILL
from perigee.kvstore.errors import CorruptRecord, NoRoom
from perigee.kvstore.records import Record
from tests.kvstore.keys import key
from tests.kvstore.ssd_log import (
    NUM_SEGMENTS,
    PER_SEGMENT,
    SLOT,
    OpenLog,
    append,
    fill,
    payload,
    read,
    record,
    recovered,
    slot,
)

# ---- what is appended can be read ------------------------------------------------------------------------------------


def test_a_block_is_read_as_it_was_appended(open_log: OpenLog) -> None:
    log = open_log()
    location = log.append(Record(key("a"), key("parent"), 17, PREFILL), slot(payload("a")))
    into = slot()
    assert log.read(location, key("a"), into) == Record(key("a"), key("parent"), 17, PREFILL, sequence=1)
    assert into == payload("a")


def test_batches_go_on_in_the_next_segment(open_log: OpenLog) -> None:
    log = open_log()
    names = [f"b{index}" for index in range(2 * PER_SEGMENT + 1)]
    locations = [append(log, "first"), *log.append_batch([(record(n), slot(payload(n))) for n in names])]
    assert len(set(locations)) == len(locations)
    assert {location.segment for location in locations} == {0, 1, 2}
    for name, location in zip(["first", *names], locations, strict=True):
        assert read(log, name, location) == payload(name)


def test_threads_append_and_read_side_by_side(open_log: OpenLog) -> None:
    log = open_log(num_segments=20)

    def there_and_back(index: int) -> None:
        name = f"t{index}"
        assert read(log, name, append(log, name)) == payload(name)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(there_and_back, range(20 * PER_SEGMENT)))
    assert log.room == 0


def test_what_does_not_fit_is_refused_whole(open_log: OpenLog) -> None:
    log = open_log()
    fill(log, "a", NUM_SEGMENTS * PER_SEGMENT - 1)
    with pytest.raises(NoRoom, match="2 records; 1 fit"):
        log.append_batch([(record("x"), slot()), (record("y"), slot())])
    append(log, "last")
    assert log.room == 0
    with pytest.raises(NoRoom):
        append(log, "more")


@pytest.mark.parametrize("size", [0, SLOT - 1, 2 * SLOT])
def test_only_whole_slots_are_moved(open_log: OpenLog, size: int) -> None:
    log = open_log()
    location = append(log, "a")
    part = memoryview(bytearray(size))
    with pytest.raises(ValueError, match=f"payload: {size} bytes"):
        log.append(record("b"), part)
    with pytest.raises(ValueError, match=f"payload: {size} bytes"):
        log.read(location, key("a"), part)


def test_reading_under_another_key_is_refused_and_counted(open_log: OpenLog) -> None:
    log = open_log()
    location = append(log, "a")
    with pytest.raises(CorruptRecord, match="another record"):
        read(log, "b", location)
    assert log.corrupt_records == 1


# ---- after a restart -------------------------------------------------------------------------------------------------


def test_a_restart_finds_all_oldest_first(open_log: OpenLog) -> None:
    log = open_log()
    written = fill(log, "a", 6)
    log.close()
    log = open_log()
    assert [(r.key, r.sequence, at) for r, at in log.recovered] == [
        (key(name), index + 1, at) for index, (name, at) in enumerate(written.items())
    ]
    assert all(read(log, name, at) == payload(name) for name, at in written.items())
    assert (log.torn_records, log.corrupt_records) == (0, 0)


def test_after_a_restart_only_empty_segments_are_written_to(open_log: OpenLog) -> None:
    log = open_log()
    written = fill(log, "a", PER_SEGMENT + 1)
    log.close()
    log = open_log()
    assert log.room == PER_SEGMENT
    written |= fill(log, "b", PER_SEGMENT)
    assert all(read(log, name, at) == payload(name) for name, at in written.items())
    log.close()
    assert recovered(open_log()) == {key(name): at for name, at in written.items()}


def test_the_last_of_several_records_of_a_key_wins(open_log: OpenLog) -> None:
    log = open_log()
    append(log, "a")
    append(log, "b")
    again = append(log, "a")
    log.close()
    log = open_log()
    assert [r.key for r, _ in log.recovered] == [key("b"), key("a")]
    assert recovered(log)[key("a")] == again


def test_numbers_go_on_after_a_restart(open_log: OpenLog) -> None:
    for expected in (1, 2, 3):
        log = open_log()
        assert log.read(append(log, "a"), key("a"), slot()).sequence == expected
        log.close()


@pytest.mark.parametrize(
    "change", [{"namespace": b"other"}, {"slot_bytes": 2 * SLOT}, {"slot_bytes": SLOT // 4096 * 8192}]
)
def test_another_format_is_ignored_and_its_space_reused(open_log: OpenLog, change: dict[str, int | bytes]) -> None:
    log = open_log()
    fill(log, "a", NUM_SEGMENTS * PER_SEGMENT)
    log.close()
    for _ in range(2):  # nothing of the old bytes shows up later either
        log = open_log(**change)
        assert (log.recovered, log.torn_records, log.corrupt_records) == ([], 0, 0)
        assert log.room == NUM_SEGMENTS * PER_SEGMENT
        log.close()
    log = open_log(**change)
    location = append(log, "b")
    log.close()
    assert recovered(open_log(**change)) == {key("b"): location}


def test_a_changed_capacity_keeps_the_segments_that_fit(open_log: OpenLog, tmp_path: Path) -> None:
    log = open_log()
    fill(log, "a", NUM_SEGMENTS * PER_SEGMENT)
    log.close()
    log = open_log(num_segments=2)
    assert len(log.recovered) == 2 * PER_SEGMENT
    assert sorted(path.name for path in tmp_path.glob("segment-*")) == ["segment-000000", "segment-000001"]
    log.close()
    log = open_log(num_segments=5)
    assert (len(log.recovered), log.room) == (2 * PER_SEGMENT, 3 * PER_SEGMENT)


# ---- recycling -------------------------------------------------------------------------------------------------------


def test_records_of_a_dropped_segment_are_gone_at_once_and_after_a_restart(open_log: OpenLog) -> None:
    log = open_log()
    written = fill(log, "a", PER_SEGMENT + 1)
    log.drop(0)
    assert log.room == 3 * PER_SEGMENT - 1
    with pytest.raises(CorruptRecord):
        read(log, "a0", written["a0"])
    log.close()
    assert set(recovered(open_log())) == {key(f"a{PER_SEGMENT}")}


def test_a_recycled_segment_never_brings_back_old_records_behind_new_ones(open_log: OpenLog) -> None:
    log = open_log(num_segments=1)
    old = fill(log, "old", PER_SEGMENT)
    for kept in range(1, PER_SEGMENT):
        log.drop(0)
        new = fill(log, f"new{kept}-", kept)
        with pytest.raises(CorruptRecord):
            read(log, "old3", old["old3"])
        log.close()
        log = open_log(num_segments=1)
        assert recovered(log) == {key(name): at for name, at in new.items()}
        assert (log.torn_records, log.corrupt_records) == (0, 0)


def test_a_segment_that_is_free_or_being_filled_cannot_be_dropped(open_log: OpenLog) -> None:
    log = open_log()
    append(log, "a")
    for segment in (0, 1):
        with pytest.raises(ValueError, match=f"segment: {segment}"):
            log.drop(segment)


def test_many_rounds_through_a_small_tier_lose_and_mix_up_nothing(open_log: OpenLog) -> None:
    log = open_log()
    written = fill(log, "start", NUM_SEGMENTS * PER_SEGMENT)
    for turn in range(4 * NUM_SEGMENTS):
        segment = turn % NUM_SEGMENTS
        log.drop(segment)
        written = {name: at for name, at in written.items() if at.segment != segment}
        written |= fill(log, f"turn{turn}-", PER_SEGMENT)
        assert all(read(log, name, at) == payload(name) for name, at in written.items())
    log.close()
    assert recovered(open_log()) == {key(name): at for name, at in written.items()}
