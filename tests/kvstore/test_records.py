from dataclasses import replace

import pytest

from perigee.kvstore import records
from perigee.kvstore.blocks import DECODE, PREFILL, BlockKey
from perigee.kvstore.errors import TierFailed
from perigee.kvstore.records import (
    HEADER_BLOCK_BYTES,
    DamagedHeader,
    OtherFormat,
    Record,
    SegmentFormat,
    StoredRecord,
    decode_record,
    decode_segment,
    encode_record,
    encode_segment,
    fitting_segment_bytes,
    numbered,
)
from tests.kvstore.keys import ROOT, key

LAYOUT = SegmentFormat(slot_bytes=8192, segment_bytes=4096 + 3 * 12288, namespace=b"model")
STORED = StoredRecord(Record(key("block"), ROOT, 31, DECODE, sequence=7), epoch=2**63 + 1, payload_checksum=2**64 - 1)

OTHERS = [
    SegmentFormat(4096, LAYOUT.segment_bytes, LAYOUT.namespace),
    replace(LAYOUT, namespace=b"other"),
    replace(LAYOUT, namespace=b""),
]


def flipped(block: bytes, index: int) -> bytes:
    return block[:index] + bytes([block[index] ^ 0x10]) + block[index + 1 :]


def test_headers_round_trip_in_a_whole_block() -> None:
    block = encode_record(STORED, LAYOUT)
    assert len(block) == HEADER_BLOCK_BYTES
    assert decode_record(block, LAYOUT) == STORED
    assert decode_segment(encode_segment(99, LAYOUT), LAYOUT) == 99


def test_no_byte_of_a_header_may_change() -> None:
    record, segment = encode_record(STORED, LAYOUT), encode_segment(99, LAYOUT)
    for index in range(HEADER_BLOCK_BYTES):
        with pytest.raises(DamagedHeader):
            decode_record(flipped(record, index), LAYOUT)
        with pytest.raises(DamagedHeader):
            decode_segment(flipped(segment, index), LAYOUT)


@pytest.mark.parametrize("block", [b"", b"short", bytes(HEADER_BLOCK_BYTES), b"\xff" * HEADER_BLOCK_BYTES])
def test_what_is_no_header_is_damaged(block: bytes) -> None:
    with pytest.raises(DamagedHeader):
        decode_record(block, LAYOUT)
    with pytest.raises(DamagedHeader):
        decode_segment(block, LAYOUT)


def test_a_segment_header_is_no_record_and_a_record_no_segment_header() -> None:
    with pytest.raises(DamagedHeader, match="magic"):
        decode_record(encode_segment(1, LAYOUT), LAYOUT)
    with pytest.raises(DamagedHeader, match="magic"):
        decode_segment(encode_record(STORED, LAYOUT), LAYOUT)


@pytest.mark.parametrize("other", OTHERS)
def test_another_namespace_or_slot_size_is_another_format(other: SegmentFormat) -> None:
    with pytest.raises(OtherFormat):
        decode_record(encode_record(STORED, other), LAYOUT)
    with pytest.raises(OtherFormat):
        decode_segment(encode_segment(1, other), LAYOUT)


def test_another_version_is_another_format(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = encode_record(STORED, LAYOUT), encode_segment(1, LAYOUT)
    monkeypatch.setattr(records, "FORMAT_VERSION", records.FORMAT_VERSION + 1)
    with pytest.raises(OtherFormat):
        decode_record(blocks[0], LAYOUT)
    with pytest.raises(OtherFormat, match="version"):
        decode_segment(blocks[1], LAYOUT)


def test_an_unknown_origin_is_damage() -> None:
    block = encode_record(replace(STORED, record=replace(STORED.record, origin=5)), LAYOUT)
    with pytest.raises(DamagedHeader, match="origin: 5"):
        decode_record(block, LAYOUT)


def test_a_record_is_numbered_and_its_keys_must_fit() -> None:
    assert numbered(Record(key("a"), ROOT, 1, PREFILL), 5).sequence == 5
    for record in (Record(BlockKey(b"short"), ROOT, 1, PREFILL), Record(key("a"), BlockKey(b"x" * 33), 1, PREFILL)):
        with pytest.raises(ValueError, match="allowed are 32"):
            numbered(record, 1)


def test_records_lie_side_by_side_after_the_segment_header() -> None:
    locations = [LAYOUT.location(4, position) for position in range(LAYOUT.records_per_segment)]
    assert [location.offset for location in locations] == [4096, 4096 + 12288, 4096 + 2 * 12288]
    assert {(location.segment, location.length) for location in locations} == {(4, 12288)}


@pytest.mark.parametrize(
    ("slot_bytes", "segment_bytes", "field"),
    [(0, 40960, "slot_bytes: 0"), (5000, 40960, "slot_bytes: 5000"), (8192, 12288, "segment_bytes: 12288")],
)
def test_a_format_without_room_for_a_record_is_refused(slot_bytes: int, segment_bytes: int, field: str) -> None:
    with pytest.raises(TierFailed, match=f"{field}; allowed are multiples of 4096"):
        SegmentFormat(slot_bytes, segment_bytes, b"")


@pytest.mark.parametrize("slot_bytes", [4096, 128 << 10, 2 << 20])
@pytest.mark.parametrize("capacity_bytes", [1 << 20, 100 << 20, 10 << 30, 4 << 40])
def test_a_tier_has_some_dozens_of_segments_where_that_fits(slot_bytes: int, capacity_bytes: int) -> None:
    layout = SegmentFormat(slot_bytes, fitting_segment_bytes(slot_bytes, capacity_bytes), b"")
    num_segments = capacity_bytes // layout.segment_bytes
    assert 8 <= num_segments <= 256 or layout.records_per_segment == 1
    assert layout.segment_bytes - 4096 == layout.records_per_segment * layout.record_bytes
