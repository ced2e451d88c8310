"""Payloads: what a page holds comes back bit by bit, and its header and centroids tell the truth."""

import torch
import xxhash

from perigee.kvstore.blocks import DECODE, HEADER_BYTES, PREFILL, PayloadHeader, PayloadLayout
from perigee.workers.attention.base import KVPool
from perigee.workers.engine.kv_io import payload_views, read_payload, write_payload

LAYOUT = PayloadLayout(num_layers=3, parts=2, width=8, dtype="bfloat16", block_tokens=4)


def filled_pool() -> KVPool:
    pool = KVPool(LAYOUT, num_pages=4)
    pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(0)))
    return pool


def payload_of(pool: KVPool, page: int, num_tokens: int, origin: int = PREFILL) -> memoryview:
    payload = memoryview(bytearray(b"\xaa" * HEADER_BYTES + bytes(LAYOUT.payload_bytes - HEADER_BYTES)))
    write_payload(pool, page, num_tokens, origin, payload)
    return payload


def test_a_page_comes_back_in_another_pool() -> None:
    pool, other = filled_pool(), KVPool(LAYOUT, num_pages=4)
    assert read_payload(other, 3, payload_of(pool, 1, 4)) == 4
    assert torch.equal(other.page(3, 4), pool.page(1, 4))


def test_a_partial_block_brings_its_tokens_and_nothing_else() -> None:
    pool, other = filled_pool(), KVPool(LAYOUT, num_pages=4)
    assert read_payload(other, 0, payload_of(pool, 2, 3)) == 3
    assert torch.equal(other.page(0, 3), pool.page(2, 3))
    assert not other.tensor[:, :, 3:].any()


def test_header_names_tokens_origin_and_checksum() -> None:
    payload = payload_of(filled_pool(), 0, 3, DECODE)
    header = PayloadHeader.unpack(payload)
    assert (header.num_tokens, header.origin) == (3, DECODE)
    assert header.checksum == xxhash.xxh3_64_intdigest(payload[HEADER_BYTES:])


def test_the_centroid_is_the_mean_of_the_keys() -> None:
    pool = filled_pool()
    _, centroids = payload_views(payload_of(pool, 2, 3), LAYOUT)
    expected = pool.page(2, 3)[:, 0].float().mean(dim=1)
    assert torch.allclose(centroids, expected, atol=1e-6)


def test_the_same_page_makes_the_same_bytes_whatever_the_slot_held_before() -> None:
    pool = filled_pool()
    used = payload_of(pool, 0, 4)
    write_payload(pool, 1, 2, PREFILL, used)
    assert used == payload_of(pool, 1, 2)
