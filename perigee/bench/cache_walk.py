"""A store node's index under the prompts of a trace, one after another, without the payloads."""

import hashlib
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from perigee.bench.errors import BenchError
from perigee.kvstore.blocks import PREFILL, BlockKey
from perigee.kvstore.evict import EvictionPolicy
from perigee.kvstore.evict.ranked import RankedBlocks
from perigee.kvstore.index import BlockIndex, GroupId
from perigee.kvstore.messages import CommittedBlock
from perigee.replay.trace import TraceRequest

ROOT = BlockKey(bytes(32))
_NEVER = 1 << 62


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
    """The prompts in blocks of `block_tokens`. Raises BenchError unless those divide the blocks of the trace."""
    return [_keys(request, block_tokens) for request in trace]


def _keys(request: TraceRequest, block_tokens: int) -> Prompt:
    """Equal ids of the trace are equal prefixes, so that an id and a place in its block name a block."""
    per_id, rest = divmod(request.block_tokens, block_tokens)
    if rest:
        raise BenchError(f"--block-tokens: {block_tokens} given, allowed are divisors of {request.block_tokens}")
    num_blocks = -(-request.input_tokens // block_tokens)
    names = (f"{request.prefix_ids[index // per_id]}/{index % per_id}" for index in range(num_blocks))
    return tuple(BlockKey(hashlib.sha256(name.encode()).digest()) for name in names)


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


class Foresight:
    """Belady's MIN under the store's rules: the block that is used again last goes first.

    It knows the trace, and is bound like any other policy: every block of a prompt is brought in, none leaves while
    its prompt is being served, and children go before their parents, which are never used again after them.
    """

    def __init__(self, prompts: Sequence[Prompt], num_slots: int) -> None:
        self._coming: defaultdict[BlockKey, deque[int]] = defaultdict(deque)
        for number, prompt in enumerate(prompts):
            for key in prompt[:num_slots]:
                self._coming[key].append(number)
        self._allowed = RankedBlocks()

    def use(self, key: BlockKey, now: float, parent: BlockKey) -> None:
        self._coming[key].popleft()

    def allow(self, key: BlockKey, partial: bool) -> None:
        coming = self._coming[key]
        self._allowed.add(key, (-coming[0] if coming else -_NEVER,))

    def forbid(self, key: BlockKey) -> None:
        self._allowed.discard(key)

    def pop(self) -> BlockKey | None:
        return self._allowed.pop()
