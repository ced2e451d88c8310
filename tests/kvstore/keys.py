"""Names for blocks in tests."""

import hashlib

from perigee.kvstore.blocks import BlockKey

ROOT = BlockKey(bytes(32))


def key(name: str) -> BlockKey:
    return BlockKey(hashlib.sha256(name.encode()).digest())


def chain(name: str, length: int) -> list[BlockKey]:
    """Keys of a prompt; the tests of the store only need them to be different."""
    return [key(f"{name}/{index}") for index in range(length)]
