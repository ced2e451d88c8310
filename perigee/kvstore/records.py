"""The bytes of the SSD tier: segments of one size, each a header block and then records of one size.

A record is a header block and the payload of a whole slot. Blocks and slots are multiples of `ALIGNMENT`, so direct I/O
moves a record between the disk and an arena slot without a copy. Since all records of a segment have one size, their
places are known in advance: a damaged record hides none of those after it.

A segment has an *epoch*, a random number which it gets anew each time it is emptied. Only records that carry it belong
to the segment; what an earlier use left behind does not.
"""

import hashlib
import struct
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from perigee.kvstore.blocks import ALIGNMENT, DECODE, KEY_BYTES, PREFILL, BlockKey
from perigee.kvstore.errors import TierFailed

FORMAT_VERSION = 1
HEADER_BLOCK_BYTES = ALIGNMENT
BLANK = bytes(HEADER_BLOCK_BYTES)

_SEGMENT_MAGIC = b"PRGEsegm"
_RECORD_MAGIC = b"PRGErecd"
# magic, version, namespace, slot bytes, segment bytes, epoch
_SEGMENT = struct.Struct("<8sH6x16sQQQ")
# magic, version, origin, number of tokens, namespace, epoch, sequence, payload bytes, key, parent, payload checksum
_RECORD = struct.Struct("<8sHBxI16sQQQ32s32sQ")
# Every header block ends with the xxh3-64 of all its other bytes, the zeros included.
_CHECKSUM = struct.Struct("<Q")
_CHECKED_BYTES = HEADER_BLOCK_BYTES - _CHECKSUM.size
_NAMESPACE_BYTES = 16

# A segment of this many records is large enough to be written and given up in one go; of 2 MiB it makes 128 MiB.
_USUAL_RECORDS = 64
_MIN_SEGMENTS, _MAX_SEGMENTS = 8, 256


@dataclass(frozen=True, slots=True)
class Record:
    """A block on SSD, without its payload. `sequence` is given by the log as it appends; a later one is newer."""

    key: BlockKey
    parent: BlockKey
    num_tokens: int
    origin: int
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Location:
    """Where a record is: `length` bytes, its header included, from `offset` in a segment."""

    segment: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as its header block tells it. `payload_checksum` is the xxh3-64 of the whole payload."""

    record: Record
    epoch: int
    payload_checksum: int


class DamagedHeader(ValueError):
    """These bytes are no header block, or one that was changed."""


class OtherFormat(ValueError):
    """An intact header block of another version, namespace or size."""


@dataclass(frozen=True, slots=True)
class SegmentFormat:
    """What must be equal for records to be readable. `namespace` may be any bytes.

    Raises TierFailed if no segment can be like that.
    """

    slot_bytes: int
    segment_bytes: int
    namespace: bytes

    def __post_init__(self) -> None:
        if self.slot_bytes <= 0 or self.slot_bytes % ALIGNMENT:
            raise TierFailed(f"slot_bytes: {self.slot_bytes}; allowed are multiples of {ALIGNMENT}")
        if self.records_per_segment < 1 or self.segment_bytes % ALIGNMENT:
            least = HEADER_BLOCK_BYTES + self.record_bytes
            raise TierFailed(f"segment_bytes: {self.segment_bytes}; allowed are multiples of {ALIGNMENT} from {least}")

    @property
    def record_bytes(self) -> int:
        return HEADER_BLOCK_BYTES + self.slot_bytes

    @property
    def records_per_segment(self) -> int:
        return (self.segment_bytes - HEADER_BLOCK_BYTES) // self.record_bytes

    @property
    def namespace_digest(self) -> bytes:
        return hashlib.sha256(self.namespace).digest()[:_NAMESPACE_BYTES]

    def location(self, segment: int, position: int) -> Location:
        """Of the record at `position`, from 0 to `records_per_segment` - 1."""
        return Location(segment, HEADER_BLOCK_BYTES + position * self.record_bytes, self.record_bytes)


def fitting_segment_bytes(slot_bytes: int, capacity_bytes: int) -> int:
    """A segment size for a tier of `capacity_bytes`: some dozens of segments, each of many records, where that fits.

    It changes with the capacity in powers of two only, since another segment size makes what is on disk unreadable.
    """
    record_bytes = HEADER_BLOCK_BYTES + slot_bytes
    records = _USUAL_RECORDS
    while records > 1 and capacity_bytes < _MIN_SEGMENTS * (HEADER_BLOCK_BYTES + records * record_bytes):
        records //= 2
    while capacity_bytes > _MAX_SEGMENTS * (HEADER_BLOCK_BYTES + records * record_bytes):
        records *= 2
    return HEADER_BLOCK_BYTES + records * record_bytes


def encode_segment(epoch: int, layout: SegmentFormat) -> bytes:
    """The header block of a segment."""
    sizes = (layout.slot_bytes, layout.segment_bytes)
    return _seal(_SEGMENT.pack(_SEGMENT_MAGIC, FORMAT_VERSION, layout.namespace_digest, *sizes, epoch))


def decode_segment(block: bytes, layout: SegmentFormat) -> int:
    """The segment's epoch. Raises DamagedHeader, or OtherFormat."""
    _check_seal(block)
    magic, version, *format_fields, epoch = _SEGMENT.unpack_from(block)
    if magic != _SEGMENT_MAGIC:
        raise DamagedHeader(f"magic: {magic!r}; expected {_SEGMENT_MAGIC!r}")
    if version != FORMAT_VERSION:
        raise OtherFormat(f"version: {version}; expected {FORMAT_VERSION}")
    if format_fields != [layout.namespace_digest, layout.slot_bytes, layout.segment_bytes]:
        raise OtherFormat("namespace, slot_bytes or segment_bytes differ")
    return int(epoch)


def encode_record(stored: StoredRecord, layout: SegmentFormat) -> bytes:
    """The header block of a record."""
    record = stored.record
    return _seal(
        _RECORD.pack(
            _RECORD_MAGIC,
            FORMAT_VERSION,
            record.origin,
            record.num_tokens,
            layout.namespace_digest,
            stored.epoch,
            record.sequence,
            layout.slot_bytes,
            record.key,
            record.parent,
            stored.payload_checksum,
        )
    )


def decode_record(block: bytes, layout: SegmentFormat) -> StoredRecord:
    """Raises DamagedHeader, or OtherFormat."""
    _check_seal(block)
    magic, version, origin, num_tokens, namespace, epoch, sequence, payload_bytes, key, parent, checksum = (
        _RECORD.unpack_from(block)
    )
    if magic != _RECORD_MAGIC or origin not in (PREFILL, DECODE):
        raise DamagedHeader(f"magic: {magic!r}, origin: {origin}; expected {_RECORD_MAGIC!r}, {PREFILL} or {DECODE}")
    if (version, namespace, payload_bytes) != (FORMAT_VERSION, layout.namespace_digest, layout.slot_bytes):
        raise OtherFormat("version, namespace or slot_bytes differ")
    return StoredRecord(Record(BlockKey(key), BlockKey(parent), num_tokens, origin, sequence), epoch, checksum)


def numbered(record: Record, sequence: int) -> Record:
    """`record` as the log stores it. Raises ValueError if a header cannot hold it."""
    if len(record.key) != KEY_BYTES or len(record.parent) != KEY_BYTES:
        raise ValueError(f"key, parent: {len(record.key)}, {len(record.parent)} bytes; allowed are {KEY_BYTES}")
    return Record(record.key, record.parent, record.num_tokens, record.origin, sequence)


def _seal(header: bytes) -> bytes:
    checked = header.ljust(_CHECKED_BYTES, b"\0")
    return checked + _CHECKSUM.pack(xxh3_64_intdigest(checked))


def _check_seal(block: bytes) -> None:
    if len(block) != HEADER_BLOCK_BYTES:
        raise DamagedHeader(f"{len(block)} bytes; expected {HEADER_BLOCK_BYTES}")
    if block[_CHECKED_BYTES:] != _CHECKSUM.pack(xxh3_64_intdigest(block[:_CHECKED_BYTES])):
        raise DamagedHeader("checksum of the header does not match")
