import mmap
import os
import threading
from collections.abc import Iterator

import pytest

from perigee.kvstore import dram
from perigee.kvstore.dram import Arena, Mapping, allocate

SIZE = 1 << 20


@pytest.fixture
def mapping() -> Iterator[Mapping]:
    mapping = Mapping(allocate(SIZE), SIZE)
    yield mapping
    mapping.close()


def test_two_mappings_of_one_descriptor_show_the_same_bytes(mapping: Mapping) -> None:
    other = Mapping(os.dup(mapping.fd), SIZE)
    Arena(mapping, 4096).payload(7)[:5] = b"block"
    assert bytes(Arena(other, 4096).payload(7)[:5]) == b"block"
    other.close()


def test_slots_do_not_overlap_and_there_are_no_others(mapping: Mapping) -> None:
    arena = Arena(mapping, 3 * 4096)
    assert arena.num_slots == SIZE // (3 * 4096)
    for slot in range(arena.num_slots):
        arena.payload(slot)[:] = bytes([slot]) * arena.slot_bytes
    assert all(set(arena.payload(slot)) == {slot} for slot in range(arena.num_slots))
    for slot in (-1, arena.num_slots):
        with pytest.raises(IndexError, match=f"slot: {slot}; allowed are 0 to {arena.num_slots - 1}"):
            arena.payload(slot)


def test_nobody_who_got_the_descriptor_can_shrink_the_memory_under_the_others(mapping: Mapping) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(mapping.fd, 0)


def _resident_pages(mapping: Mapping) -> int:
    return os.fstat(mapping.fd).st_blocks * 512 // mmap.PAGESIZE


@pytest.mark.parametrize("advice", [dram._MADV_POPULATE_WRITE, 9999], ids=["with advice", "by touching"])
def test_populating_makes_every_page_present_and_changes_none(
    mapping: Mapping, advice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dram, "_MADV_POPULATE_WRITE", advice)
    mapping.view(5000, 4)[:] = b"kept"
    assert _resident_pages(mapping) == 1
    mapping.populate()
    assert _resident_pages(mapping) == SIZE // mmap.PAGESIZE
    assert bytes(mapping.view(5000, 4)) == b"kept"


def test_a_view_outlives_its_mapping(mapping: Mapping) -> None:
    view = mapping.view(0, 4)
    mapping.close()
    mapping.close()
    view[:] = b"here"
    assert bytes(view) == b"here"


def test_populating_ends_when_the_mapping_is_closed(mapping: Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dram, "_POPULATE_CHUNK_BYTES", mmap.PAGESIZE)
    thread = threading.Thread(target=mapping.populate)
    thread.start()
    mapping.close()
    thread.join()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(mapping.fd)
