"""What an SSD tier finds in its segments when it opens: the records of which there is no doubt, and counts of others.

All headers are read, and the payloads of the newest records: those that were being written when the process died. The
payloads of older records are verified when they are read, as always; to read them all would take many minutes.
"""

import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from xxhash import xxh3_64_intdigest

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.records import (
    BLANK,
    HEADER_BLOCK_BYTES,
    DamagedHeader,
    Location,
    OtherFormat,
    Record,
    SegmentFormat,
    StoredRecord,
    decode_record,
    decode_segment,
)
from perigee.kvstore.segments import SegmentFile

# More than any pool of threads has in flight. At 2 MiB they take a tenth of a second to verify.
_VERIFIED_RECORDS = 64
# Header reads are small and wait for the disk one by one; this many at once keep it busy.
_SCANNING_THREADS = 8


@dataclass(frozen=True, slots=True)
class Found:
    """A record whose header is intact, and where it is."""

    stored: StoredRecord
    location: Location


@dataclass(slots=True)
class ScannedSegment:
    """`epoch` is None if the segment is new, of another format, or its header is damaged: then nothing in it counts."""

    epoch: int | None
    found: list[Found] = field(default_factory=list)
    torn_records: int = 0
    corrupt_records: int = 0


@dataclass(frozen=True, slots=True)
class Recovery:
    """`records` are in order of their sequence, one for each key. `epochs` has one entry for each segment."""

    records: list[tuple[Record, Location]]
    epochs: list[int | None]
    next_sequence: int
    torn_records: int
    corrupt_records: int


def recover(files: Sequence[SegmentFile], layout: SegmentFormat) -> Recovery:
    """Reads the segments `files`. Raises TierFailed if one cannot be read."""
    with ThreadPoolExecutor(_SCANNING_THREADS, "ssd-scan") as threads:
        scans = list(threads.map(lambda number: _scan(files[number], number, layout), range(len(files))))
    found = sorted((f for scan in scans for f in scan.found), key=lambda f: f.stored.record.sequence)
    newest = found[-_VERIFIED_RECORDS:]
    whole = [f for f in newest if _is_whole(files[f.location.segment], f)]
    latest: dict[BlockKey, tuple[Record, Location]] = {}
    for f in (*found[:-_VERIFIED_RECORDS], *whole):
        latest.pop(f.stored.record.key, None)  # so that the order is that of the sequence
        latest[f.stored.record.key] = (f.stored.record, f.location)
    return Recovery(
        records=list(latest.values()),
        epochs=[scan.epoch for scan in scans],
        next_sequence=found[-1].stored.record.sequence + 1 if found else 1,
        torn_records=sum(scan.torn_records for scan in scans) + len(newest) - len(whole),
        corrupt_records=sum(scan.corrupt_records for scan in scans),
    )


def _scan(file: SegmentFile, number: int, layout: SegmentFormat) -> ScannedSegment:
    block = memoryview(mmap.mmap(-1, HEADER_BLOCK_BYTES))
    scanned = _scan_segment_header(file, block, layout)
    if scanned.epoch is None:
        return scanned
    if file.size_bytes() < layout.segment_bytes:
        scanned.torn_records += 1  # the one that was cut; of those after it nothing is left to count
    for position in range(layout.records_per_segment):
        location = layout.location(number, position)
        if file.read([block], location.offset) < HEADER_BLOCK_BYTES:
            break
        _scan_record(scanned, bytes(block), location, layout)
    return scanned


def _scan_segment_header(file: SegmentFile, block: memoryview, layout: SegmentFormat) -> ScannedSegment:
    came = file.read([block], 0)
    if came == 0 or block == BLANK:
        return ScannedSegment(None)  # new, or its maker died before it wrote the header
    try:
        return ScannedSegment(decode_segment(bytes(block[:came]), layout))
    except OtherFormat:
        return ScannedSegment(None)
    except DamagedHeader:
        return ScannedSegment(None, corrupt_records=1)


def _scan_record(scanned: ScannedSegment, block: bytes, location: Location, layout: SegmentFormat) -> None:
    if block == BLANK:
        return
    try:
        stored = decode_record(block, layout)
    except (DamagedHeader, OtherFormat):
        scanned.corrupt_records += 1
        return
    if stored.epoch == scanned.epoch:
        scanned.found.append(Found(stored, location))


def _is_whole(file: SegmentFile, found: Found) -> bool:
    payload_bytes = found.location.length - HEADER_BLOCK_BYTES
    payload = memoryview(mmap.mmap(-1, payload_bytes))
    if file.read([payload], found.location.offset + HEADER_BLOCK_BYTES) < payload_bytes:
        return False
    return xxh3_64_intdigest(payload) == found.stored.payload_checksum
