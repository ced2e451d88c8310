"""Whole payloads, as a worker writes and checks them."""

from xxhash import xxh3_64_intdigest

from perigee.kvstore.blocks import HEADER_BYTES, PREFILL, PayloadHeader
from perigee.kvstore.client import CommittedBlock, Reservation, StoreClient


def write(client: StoreClient, reservation: Reservation, num_tokens: int = 32) -> CommittedBlock:
    """Fills the reserved slot with bytes of its own, header and checksum included; what to commit then."""
    payload = client.payload(reservation.slot)
    payload[HEADER_BYTES:] = bytes([reservation.index]) * (client.slot_bytes - HEADER_BYTES)
    checksum = xxh3_64_intdigest(payload[HEADER_BYTES:])
    payload[:HEADER_BYTES] = PayloadHeader(num_tokens, PREFILL, checksum).pack()
    return CommittedBlock(reservation.slot, reservation.nonce, num_tokens, PREFILL)


def is_intact(payload: memoryview, index: int) -> bool:
    """Whether it is what `write` wrote for the block of `index`."""
    content = payload[HEADER_BYTES:]
    return PayloadHeader.unpack(payload).checksum == xxh3_64_intdigest(content) and set(content) == {index}
