"""A store node's index under the prompts of a trace, one after another, without the payloads."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from perigee.kvstore.blocks import PREFILL, BlockKey
from perigee.kvstore.evict import EvictionPolicy
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.index import BlockIndex
from perigee.kvstore.messages import CommittedBlock
from perigee.replay.keys import ROOT, PromptKeys
from perigee.replay.trace import TraceRequest

Prompt = tuple[BlockKey, ...]
"""The keys of its blocks, the first at the root."""


@dataclass(frozen=True, slots=True)
class Walk:
    """What a cache did with all prompts. A block is hit if it was there with all blocks before it in the prompt."""

    num_blocks: int
    num_hits: int
    seconds: float

    @property
    def hit_ratio(self) -> float:
        return self.num_hits / self.num_blocks

    @property
    def us_per_block(self) -> float:
        return self.seconds / self.num_blocks * 1e6


def prompts_of(trace: Sequence[TraceRequest], block_tokens: int) -> list[Prompt]:
    """The prompts in blocks of `block_tokens`. Raises TraceError unless those divide the blocks of the trace."""
    keys = PromptKeys(block_tokens)
    return [keys.of(request) for request in trace]


def walk(prompts: Sequence[Prompt], num_slots: int, policy: EvictionPolicy) -> Walk:
    """Leases what is there of each prompt and commits the rest, as much of it as the arena could ever hold.

    Time is the number of the prompt. All blocks are taken for full ones: policies are not told where a prompt ends.
    """
    index = BlockIndex(num_slots, 1, policy)
    num_hits, started = 0, perf_counter()
    for number, prompt in enumerate(prompts):
        num_hits += _serve(index, GroupId(1, number), prompt[:num_slots], number)
    return Walk(sum(len(prompt) for prompt in prompts), num_hits, perf_counter() - started)


def _serve(index: BlockIndex, group: GroupId, keys: Sequence[BlockKey], now: float) -> int:
    """How many of a prompt's blocks were hits."""
    acquired = index.acquire(group, keys, ROOT, now)
    assert acquired is not None, "nothing else is leased"
    commits = [CommittedBlock(reserved.slot, reserved.nonce, 1, PREFILL) for reserved in acquired.reserved]
    index.commit(group, commits, now)
    index.release(group)
    index.take_events()
    return len(acquired.leased)
