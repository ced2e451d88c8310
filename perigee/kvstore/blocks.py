"""Block keys and payload layout: what a KVCache block is called, and what its bytes mean.

A block holds the KVCache of `block_tokens` consecutive tokens of one sequence. Its key is chained over everything
before it, so equal keys mean equal prefixes under the same model, dtype, layout and tenant.
"""

import hashlib
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NewType

BlockKey = NewType("BlockKey", bytes)

KEY_BYTES = 32
NO_SALT = bytes(KEY_BYTES)
NO_PARENT = BlockKey(bytes(KEY_BYTES))  # of a block whose predecessor nobody named
LAYOUT_VERSION = 1

DType = Literal["float32", "bfloat16"]
DTYPE_BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2}

# Slots start on a page and are a whole number of pages, as direct I/O and huge transfers want them.
ALIGNMENT = 4096


def namespace(
    *,
    weights_digest: str,
    weights_epoch: int,
    adapter: str,
    dtype: DType,
    layout_version: int,
    block_tokens: int,
    attention: str,
) -> BlockKey:
    """The root of a key chain: two models, dtypes, layouts or attention configurations never share a block."""
    fields = (weights_digest, weights_epoch, adapter, dtype, layout_version, block_tokens, attention)
    # Each field is framed by its length, so no two different tuples make the same bytes.
    encoded = [str(field).encode() for field in fields]
    return BlockKey(hashlib.sha256(b"".join(struct.pack("<I", len(e)) + e for e in encoded)).digest())


def next_key(parent: BlockKey, token_ids: Sequence[int], salt: bytes = NO_SALT) -> BlockKey:
    """`sha256(parent ‖ salt ‖ tokens as little-endian u32)`, the key of the block of `token_ids` after `parent`."""
    return BlockKey(hashlib.sha256(parent + salt + _little_endian_u32(token_ids)).digest())


def chain(
    root: BlockKey, token_ids: Sequence[int], block_tokens: int, salt: bytes = NO_SALT, salt_block: int = 0
) -> list[BlockKey]:
    """The keys of all blocks of `token_ids`, the last one partial unless the length is a multiple of `block_tokens`.

    `salt` is mixed into the block of index `salt_block`, from which on the sequence is its tenant's alone.
    """
    keys: list[BlockKey] = []
    parent = root
    for index, start in enumerate(range(0, len(token_ids), block_tokens)):
        block_salt = salt if index == salt_block else NO_SALT
        parent = next_key(parent, token_ids[start : start + block_tokens], block_salt)
        keys.append(parent)
    return keys


def num_blocks(num_tokens: int, block_tokens: int) -> int:
    """How many blocks `num_tokens` take, the last one perhaps partial."""
    return -(-num_tokens // block_tokens)


def _little_endian_u32(token_ids: Iterable[int]) -> bytes:
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


@dataclass(frozen=True, slots=True)
class PayloadLayout:
    """Where what lies in a block's payload.

    64-byte header; then per layer `parts` tensors of `[block_tokens, width]` (Llama: rotated keys, values; MLA: one
    part, latent and rotated rope key side by side); then per layer a float32 centroid of `[width]`: the mean of part 0
    over the block's tokens.
    """

    num_layers: int
    parts: int
    width: int
    dtype: DType
    block_tokens: int

    @property
    def tensor_bytes(self) -> int:
        return self.num_layers * self.parts * self.block_tokens * self.width * DTYPE_BYTES[self.dtype]

    @property
    def centroid_bytes(self) -> int:
        return self.num_layers * self.width * 4

    @property
    def end(self) -> int:
        """Where the content ends; what pads it to `payload_bytes` stays zero."""
        return HEADER_BYTES + self.tensor_bytes + self.centroid_bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes of one block, rounded up to `ALIGNMENT`."""
        return -(-self.end // ALIGNMENT) * ALIGNMENT


HEADER_BYTES = 64
_HEADER = struct.Struct("<4sHBxI4xQ40x")
_MAGIC = b"PRGE"
PREFILL, DECODE = 0, 1


@dataclass(frozen=True, slots=True)
class PayloadHeader:
    """The first 64 bytes of a payload. `checksum` is xxh3-64 over all bytes after the header."""

    num_tokens: int
    origin: int
    checksum: int

    def pack(self) -> bytes:
        return _HEADER.pack(_MAGIC, LAYOUT_VERSION, self.origin, self.num_tokens, self.checksum)

    @classmethod
    def unpack(cls, header: bytes | memoryview) -> "PayloadHeader":
        """Raises ValueError if these are not the first bytes of a payload of this layout version."""
        magic, version, origin, num_tokens, checksum = _HEADER.unpack_from(header)
        if magic != _MAGIC or version != LAYOUT_VERSION or origin not in (PREFILL, DECODE):
            raise ValueError(f"not a payload header: magic {magic!r}, version {version}, origin {origin}")
        return cls(num_tokens, origin, checksum)
