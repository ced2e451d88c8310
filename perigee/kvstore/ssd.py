"""The SSD tier's log: blocks are appended to segments of a fixed capacity, and whole segments are given up.

Nothing is ever synced. The tier is a cache whose records carry checksums over all their bytes, so what a crash or power
loss tears is a miss, as is what it loses; and what it may bring back, records of a segment given up shortly before, is
still what their keys name, since keys name content. Waiting for the disk's own cache would slow writes for nothing.
"""

import contextlib
import logging
import mmap
import os
import secrets
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.errors import CorruptRecord, NoRoom, TierFailed
from perigee.kvstore.records import (
    HEADER_BLOCK_BYTES,
    DamagedHeader,
    Location,
    OtherFormat,
    Record,
    SegmentFormat,
    StoredRecord,
    decode_record,
    encode_record,
    encode_segment,
    numbered,
)
from perigee.kvstore.recovery import Recovery, recover
from perigee.kvstore.segments import SegmentFile, lock

logger = logging.getLogger(__name__)

_MAX_BATCH = 256  # blocks in one write: two buffers each, and the kernel takes 1024 buffers at once


class _Write(NamedTuple):
    record: Record
    payload: memoryview
    location: Location


class SegmentLog:
    """The records in one folder, which is this process's alone. `recovered` are those that were there, oldest first.

    All methods block, and any number of threads may call them at once; appends of several threads go on side by side. A
    location is readable until its segment is dropped. Who drops a segment sees to it that nobody reads there still;
    somebody who does gets CorruptRecord, never another block's bytes.
    """

    def __init__(self, layout: SegmentFormat, files: Sequence[SegmentFile], recovery: Recovery) -> None:
        """Takes over segments that were just scanned. Use `open`."""
        self.layout = layout
        self.recovered = recovery.records
        self.torn_records = recovery.torn_records  # cut off while they were written; found at open
        self.corrupt_records = recovery.corrupt_records  # changed since they were written; found at open or by a read
        self._files = files
        self._headers = _HeaderBlocks()
        self._closing = contextlib.ExitStack()
        # Guards all that follows, and the counts.
        self._lock = threading.Lock()
        self._next_sequence = recovery.next_sequence
        self._free = deque(_free_segments(recovery))
        self._filling = -1  # the segment that is appended to, if `_position` is less than the records of a segment
        self._position = layout.records_per_segment
        self._epochs = [self._begin_epoch(n) if epoch is None else epoch for n, epoch in enumerate(_kept(recovery))]

    @classmethod
    def open(
        cls, folder: Path, *, slot_bytes: int, capacity_bytes: int, segment_bytes: int, namespace: bytes
    ) -> "SegmentLog":
        """Takes possession of `folder`, which must exist, and finds what it holds.

        Reserves `capacity_bytes`, rounded down to whole segments. What has another slot or segment size, namespace or
        version is ignored and written over. A segment that was not full is not filled further: each start gives up what
        was left of one. Raises TierFailed.
        """
        layout = SegmentFormat(slot_bytes, segment_bytes, namespace)
        num_segments = capacity_bytes // segment_bytes
        if num_segments < 1:
            raise TierFailed(f"capacity_bytes: {capacity_bytes}; allowed is at least one segment of {segment_bytes}")
        with contextlib.ExitStack() as closing:
            closing.callback(os.close, lock(folder))
            files = _open_files(folder, num_segments, closing)
            recovery = recover(files, layout)
            _reserve_space(files, layout, recovery)
            log = cls(layout, files, recovery)
            log._closing = closing.pop_all()
        log._log_opened(folder)
        return log

    @property
    def num_segments(self) -> int:
        return len(self._files)

    @property
    def room(self) -> int:
        """How many records can be appended before a segment must be dropped."""
        with self._lock:
            return self._room()

    def append(self, record: Record, payload: memoryview) -> Location:
        """Writes a whole slot, which must not change meanwhile. See `append_batch`."""
        return self.append_batch([(record, payload)])[0]

    def append_batch(self, blocks: Sequence[tuple[Record, memoryview]]) -> list[Location]:
        """Writes several, in as few system calls as can be; worth it for blocks well below a megabyte.

        Raises NoRoom, with nothing written, if no segment is free for them; TierFailed if the disk fails, after which
        some of them may be on disk, but none has a location.
        """
        for _, payload in blocks:
            self._check_size(payload)
        writes = self._allocate(blocks)
        for start in range(0, len(writes), _MAX_BATCH):
            batch = writes[start : start + _MAX_BATCH]
            for segment, run in groupby(batch, key=lambda write: write.location.segment):
                self._write(segment, list(run))
        return [write.location for write in writes]

    def read(self, location: Location, record_key: BlockKey, into: memoryview) -> Record:
        """Reads the payload into a whole slot and verifies it.

        Raises CorruptRecord unless it is, to the last byte, what was appended for `record_key`; the slot may hold
        anything then. Raises TierFailed if the disk fails.
        """
        self._check_size(into)
        with self._headers.borrow(1) as (header,):
            came = self._files[location.segment].read([header, into], location.offset)
            block = bytes(header)
        try:
            return self._verified(location, came, block, record_key, into)
        except CorruptRecord:
            with self._lock:
                self.corrupt_records += 1
            raise

    def drop(self, segment: int) -> None:
        """Forgets all records of a segment that was appended to its end, or recovered, and frees it for new ones."""
        with self._lock:
            if segment in self._free or self._is_filling(segment):
                raise ValueError(f"segment: {segment}; it is free already or still being filled")
        epoch = self._begin_epoch(segment)
        with self._lock:
            self._epochs[segment] = epoch
            self._free.append(segment)

    def close(self) -> None:
        """Gives up the folder. Nothing may be under way; what is called later raises TierFailed."""
        self._closing.close()

    # ---- where to write ------------------------------------------------------------------------------------------

    def _room(self) -> int:
        return (len(self._free) + 1) * self.layout.records_per_segment - self._position

    def _is_filling(self, segment: int) -> bool:
        return segment == self._filling and self._position < self.layout.records_per_segment

    def _allocate(self, blocks: Sequence[tuple[Record, memoryview]]) -> list[_Write]:
        with self._lock:
            if len(blocks) > self._room():
                raise NoRoom(f"{len(blocks)} records; {self._room()} fit before a segment is dropped")
            return [_Write(self._numbered(record), payload, self._next_location()) for record, payload in blocks]

    def _numbered(self, record: Record) -> Record:
        record = numbered(record, self._next_sequence)
        self._next_sequence += 1
        return record

    def _next_location(self) -> Location:
        if self._position == self.layout.records_per_segment:
            self._filling, self._position = self._free.popleft(), 0
        location = self.layout.location(self._filling, self._position)
        self._position += 1
        return location

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def _check_size(self, payload: memoryview) -> None:
        if payload.nbytes != self.layout.slot_bytes:
            raise ValueError(f"payload: {payload.nbytes} bytes; allowed is a whole slot of {self.layout.slot_bytes}")

    def _write(self, segment: int, run: Sequence[_Write]) -> None:
        """Writes records that lie side by side, all in `segment`."""
        with self._headers.borrow(len(run)) as headers:
            buffers: list[memoryview] = []
            for header, write in zip(headers, run, strict=True):
                stored = StoredRecord(write.record, self._epochs[segment], xxh3_64_intdigest(write.payload))
                header[:] = encode_record(stored, self.layout)
                buffers += (header, write.payload)
            self._files[segment].write(buffers, run[0].location.offset)

    def _begin_epoch(self, segment: int) -> int:
        """Makes whatever lies in the segment a thing of the past."""
        epoch = secrets.randbits(64)
        with self._headers.borrow(1) as (header,):
            header[:] = encode_segment(epoch, self.layout)
            self._files[segment].write([header], 0)
        return epoch

    def _verified(self, location: Location, came: int, block: bytes, key: BlockKey, payload: memoryview) -> Record:
        if came < location.length:
            raise CorruptRecord(f"{location}: only {came} bytes are there")
        try:
            stored = decode_record(block, self.layout)
        except (DamagedHeader, OtherFormat) as error:
            raise CorruptRecord(f"{location}: {error}") from error
        if stored.epoch != self._epochs[location.segment] or stored.record.key != key:
            raise CorruptRecord(f"{location}: another record is there, of key {stored.record.key.hex()}")
        if stored.payload_checksum != xxh3_64_intdigest(payload):
            raise CorruptRecord(f"{location}: checksum of the payload does not match")
        return stored.record

    def _log_opened(self, folder: Path) -> None:
        if not all(file.is_direct for file in self._files):
            logger.warning("ssd tier without direct I/O, which the file system refuses: folder=%s", folder)
        logger.info(
            "ssd tier opened: folder=%s segments=%d records=%d torn=%d corrupt=%d",
            folder,
            self.num_segments,
            len(self.recovered),
            self.torn_records,
            self.corrupt_records,
        )


class _HeaderBlocks:
    """Page-aligned buffers for headers, as many as were ever in use at once."""

    def __init__(self) -> None:
        self._spare: list[memoryview] = []  # extend and pop are atomic

    @contextlib.contextmanager
    def borrow(self, count: int) -> Iterator[list[memoryview]]:
        blocks = [self._take() for _ in range(count)]
        try:
            yield blocks
        finally:
            self._spare.extend(blocks)

    def _take(self) -> memoryview:
        try:
            return self._spare.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, HEADER_BLOCK_BYTES))


def _open_files(folder: Path, num_segments: int, closing: contextlib.ExitStack) -> list[SegmentFile]:
    """The files of all segments; those of a larger capacity than today's go."""
    names = [f"segment-{number:06d}" for number in range(num_segments)]
    try:
        for path in folder.glob("segment-*"):
            if path.name not in names:
                path.unlink()
    except OSError as error:
        raise TierFailed(f"cannot remove segments of {folder}: {error.strerror}") from error
    files = []
    for name in names:
        files.append(SegmentFile(folder / name))
        closing.callback(files[-1].close)
    return files


def _kept(recovery: Recovery) -> list[int | None]:
    """The epochs of the segments with records to keep."""
    used = {location.segment for _, location in recovery.records}
    return [epoch if number in used else None for number, epoch in enumerate(recovery.epochs)]


def _free_segments(recovery: Recovery) -> list[int]:
    return [number for number, epoch in enumerate(_kept(recovery)) if epoch is None]


def _reserve_space(files: Sequence[SegmentFile], layout: SegmentFormat, recovery: Recovery) -> None:
    """Makes each file as large as a segment. If the disk has not that much, gives back what was taken."""
    for number, file in enumerate(files):
        if recovery.epochs[number] is None:
            file.empty()  # headers of our own apart, only zeros may lie where a header is looked for
    try:
        for file in files:
            file.preallocate(layout.segment_bytes)
    except TierFailed:
        for number in _free_segments(recovery):
            files[number].empty()
        raise
