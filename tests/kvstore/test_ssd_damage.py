"""The segment log after its files were damaged, or its process was killed."""

import contextlib
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from perigee.kvstore import recovery
from perigee.kvstore.errors import CorruptRecord
from perigee.kvstore.ssd import SegmentLog
from tests.kvstore.conftest import StartPython
from tests.kvstore.keys import key
from tests.kvstore.ssd_log import (
    PER_SEGMENT,
    RECORD,
    SEGMENT,
    SLOT,
    OpenLog,
    append,
    fill,
    payload,
    read,
    recovered,
)


@dataclass(frozen=True)
class Segment:
    """A log of one segment, full of blocks `a0`, `a1` ..., whose file can be damaged between two uses."""

    open: Callable[[], SegmentLog]
    path: Path
    content: bytes

    def serves(self, content: bytes) -> tuple[int, int]:
        """How many records can be read if the file holds `content`, and how many are counted as torn or corrupt."""
        self.path.write_bytes(content)
        log = self.open()
        names = {key(f"a{index}"): f"a{index}" for index in range(log.layout.records_per_segment)}
        good = 0
        for record_key, location in recovered(log).items():
            with contextlib.suppress(CorruptRecord):
                assert read(log, names[record_key], location) == payload(names[record_key])
                good += 1
        log.close()
        return good, log.torn_records + log.corrupt_records


@pytest.fixture
def segment(open_log: OpenLog, tmp_path: Path) -> Segment:
    log = open_log(num_segments=1)
    fill(log, "a", PER_SEGMENT)
    log.close()
    path = tmp_path / "segment-000000"
    return Segment(lambda: open_log(num_segments=1), path, path.read_bytes())


def flipped(content: bytes, offset: int) -> bytes:
    return content[:offset] + bytes([content[offset] ^ 0x10]) + content[offset + 1 :]


@pytest.mark.parametrize("verified", [0, 64], ids=["found by reads", "found at open"])
def test_flipped_bytes_lose_one_record_and_are_counted(
    segment: Segment, verified: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_VERIFIED_RECORDS", verified)
    for offset in range(0, SEGMENT, 331):
        left = 0 if offset < 4096 else PER_SEGMENT - 1
        assert segment.serves(flipped(segment.content, offset)) == (left, 1), offset


@pytest.mark.slow
def test_any_flipped_byte_of_a_segment_is_found_at_open(open_log: OpenLog, tmp_path: Path) -> None:
    """As many segments at once as an open reads payloads, of one record each, every one with another byte flipped."""
    at_once = recovery._VERIFIED_RECORDS
    fill(log := open_log(num_segments=at_once, per_segment=1), "a", at_once)
    log.close()
    segments = [(path, path.read_bytes()) for path in sorted(tmp_path.glob("segment-*"))]
    assert [len(content) for _, content in segments] == [4096 + RECORD] * at_once
    for first in range(0, 4096 + RECORD, at_once):
        for offset, (path, content) in enumerate(segments, first):
            path.write_bytes(flipped(content, offset))
        log = open_log(num_segments=at_once, per_segment=1)
        log.close()
        assert (recovered(log), log.torn_records + log.corrupt_records) == ({}, at_once), first


def test_any_byte_flipped_while_the_log_is_open_is_found_by_the_read(open_log: OpenLog, tmp_path: Path) -> None:
    log = open_log()
    written = fill(log, "a", 2)
    fd = os.open(tmp_path / "segment-000000", os.O_RDWR)
    for offset in range(written["a0"].offset, written["a0"].offset + RECORD):
        byte = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte[0] ^ 0x10]), offset)
        with pytest.raises(CorruptRecord):
            read(log, "a0", written["a0"])
        os.pwrite(fd, byte, offset)
    os.close(fd)
    assert log.corrupt_records == RECORD
    assert read(log, "a0", written["a0"]) == payload("a0")


def test_truncation_anywhere_serves_nothing_wrong_and_is_counted(segment: Segment) -> None:
    chance = random.Random(7)
    for size in [1, 4095, 4096, 4097, SEGMENT - 1, *(chance.randrange(1, SEGMENT) for _ in range(100))]:
        good, counted = segment.serves(segment.content[:size])
        assert good == max(0, size - 4096) // RECORD
        assert counted > 0


def test_a_header_that_came_to_disk_without_its_payload_is_torn(segment: Segment) -> None:
    last = SEGMENT - SLOT
    assert segment.serves(segment.content[:last] + bytes(SLOT)) == (PER_SEGMENT - 1, 1)


def test_a_payload_that_came_to_disk_without_its_header_is_not_there(segment: Segment) -> None:
    last = SEGMENT - RECORD
    content = segment.content[:last] + bytes(4096) + segment.content[last + 4096 :]
    assert segment.serves(content) == (PER_SEGMENT - 1, 0)


def test_a_header_of_one_record_before_the_payload_of_another_is_torn(segment: Segment) -> None:
    first, second = 4096, 4096 + RECORD
    content = segment.content[: second + 4096] + segment.content[first + 4096 : second]
    assert segment.serves(content + segment.content[second + RECORD :]) == (PER_SEGMENT - 1, 1)


def test_a_file_cut_while_it_is_open_is_found_by_the_read(open_log: OpenLog, tmp_path: Path) -> None:
    log = open_log()
    location = append(log, "a")
    os.truncate(tmp_path / "segment-000000", location.offset + 4096 + 100)
    with pytest.raises(CorruptRecord, match="bytes are there"):
        read(log, "a", location)


# Verifies what is there, tells, and then appends blocks and drops segments until it is killed. A block's content
# follows from its number, which is kept in `num_tokens` and as its key.
_APPENDER = """
import mmap, random, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from perigee.kvstore.records import Record
from perigee.kvstore.ssd import SegmentLog

SLOT, PER_SEGMENT, NUM_SEGMENTS = 256 << 10, 8, 4
SEGMENT = 4096 + PER_SEGMENT * (4096 + SLOT)

def payload(number):
    view = memoryview(mmap.mmap(-1, SLOT))
    view[:] = random.Random(number).randbytes(4096) * (SLOT // 4096)
    return view

def append(number):
    key = number.to_bytes(32, "big")
    return log.append(Record(key, bytes(32), number, 0), payload(number)).segment

log = SegmentLog.open(Path(sys.argv[1]), slot_bytes=SLOT, capacity_bytes=NUM_SEGMENTS * SEGMENT, segment_bytes=SEGMENT,
                      namespace=b"kill")
into = memoryview(mmap.mmap(-1, SLOT))
wrong = 0
for record, location in log.recovered:
    log.read(location, record.key, into)
    wrong += int.from_bytes(record.key, "big") != record.num_tokens or into != payload(record.num_tokens)
print(len(log.recovered), wrong, log.corrupt_records, flush=True)

for segment in {location.segment for _, location in log.recovered}:
    log.drop(segment)
number = 1 + max((record.num_tokens for record, _ in log.recovered), default=0)
with ThreadPoolExecutor(3) as threads:
    while True:
        filled = set(threads.map(append, range(number, number + PER_SEGMENT)))
        number += PER_SEGMENT
        print(number, flush=True)
        for segment in filled:
            if log.room < 2 * PER_SEGMENT:
                log.drop(segment)
"""


def test_a_kill_at_any_moment_leaves_only_blocks_that_are_right(tmp_path: Path, start_python: StartPython) -> None:
    chance = random.Random(5)
    found_in_all = 0
    for _ in range(8):
        child = start_python(_APPENDER, str(tmp_path))
        assert child.stdout
        found, wrong, corrupt = map(int, child.stdout.readline().split())
        assert (wrong, corrupt) == (0, 0)
        found_in_all += found
        for _ in range(chance.randrange(1, 12)):
            child.stdout.readline()
        threading.Event().wait(chance.random() * 0.01)  # somewhere in the writes that follow
        child.kill()
        child.wait()
    assert found_in_all > 0
