"""Which block to give up when the arena is full. Nothing here reads a clock: time is an argument.

The index tells a policy of every use of a block, and which blocks may go: those without lease and without resident
children. So children go before their parents under any policy, and a policy only ranks what it is allowed to take.
"""

from typing import Literal

from perigee.kvstore.evict.base import EvictionPolicy
from perigee.kvstore.evict.density import HitDensity
from perigee.kvstore.evict.lru import LRU
from perigee.kvstore.evict.s3fifo import S3FIFO

__all__ = ["LRU", "S3FIFO", "EvictionPolicy", "HitDensity", "PolicyName", "make_policy"]

PolicyName = Literal["lru", "s3fifo", "perigee"]


def make_policy(name: PolicyName, num_blocks: int) -> EvictionPolicy:
    """The policy of this name for an arena of `num_blocks` blocks."""
    match name:
        case "lru":
            return LRU()
        case "s3fifo":
            return S3FIFO()
        case "perigee":
            return HitDensity(num_blocks)
