"""Segment logs for tests: small ones, of blocks whose content follows from their name."""

import mmap
import random
from collections.abc import Callable
from pathlib import Path

from perigee.kvstore.blocks import DECODE
from perigee.kvstore.records import Location, Record
from perigee.kvstore.ssd import SegmentLog
from tests.kvstore.keys import ROOT, key

SLOT = 4096
RECORD = 4096 + SLOT
PER_SEGMENT = 4
SEGMENT = 4096 + PER_SEGMENT * RECORD
NUM_SEGMENTS = 3

OpenLog = Callable[..., SegmentLog]


def open_small(
    folder: Path,
    *,
    slot_bytes: int = SLOT,
    num_segments: int = NUM_SEGMENTS,
    per_segment: int = PER_SEGMENT,
    namespace: bytes = b"model",
) -> SegmentLog:
    segment_bytes = 4096 + per_segment * (4096 + slot_bytes)
    return SegmentLog.open(
        folder,
        slot_bytes=slot_bytes,
        capacity_bytes=num_segments * segment_bytes + 5,
        segment_bytes=segment_bytes,
        namespace=namespace,
    )


def slot(content: bytes = b"", slot_bytes: int = SLOT) -> memoryview:
    """A slot like the arena's, which starts with `content`."""
    view = memoryview(mmap.mmap(-1, slot_bytes))
    view[: len(content)] = content
    return view


def payload(name: str, slot_bytes: int = SLOT) -> bytes:
    """What the block `name` holds."""
    return random.Random(name).randbytes(slot_bytes)


def record(name: str) -> Record:
    return Record(key(name), ROOT, 5, DECODE)


def append(log: SegmentLog, name: str) -> Location:
    slot_bytes = log.layout.slot_bytes
    return log.append(record(name), slot(payload(name, slot_bytes), slot_bytes))


def fill(log: SegmentLog, name: str, count: int) -> dict[str, Location]:
    """Appends blocks called `name` with a number."""
    return {f"{name}{index}": append(log, f"{name}{index}") for index in range(count)}


def read(log: SegmentLog, name: str, location: Location) -> bytes:
    into = slot(slot_bytes=log.layout.slot_bytes)
    log.read(location, key(name), into)
    return bytes(into)


def recovered(log: SegmentLog) -> dict[bytes, Location]:
    return {record.key: location for record, location in log.recovered}
