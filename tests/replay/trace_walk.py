"""What a trace allows a prefix cache to reach, by a plain walk over it: the reference for measured ratios.

One cache of `capacity_blocks` blocks sees the requests one after another. Least recently used blocks go first, but
children before their parents. Nothing is assumed about time: every request finds all that came before it.
"""

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from perigee.replay.trace import TraceRequest

Block = tuple[int, int, int]
"""(trace block id, index of the cache block within it, tokens): a partial block is not the full one."""


@dataclass(frozen=True)
class WalkResult:
    blocks: int
    hit_blocks: int
    tokens: int
    hit_tokens: int

    @property
    def block_ratio(self) -> float:
        return self.hit_blocks / self.blocks

    @property
    def token_ratio(self) -> float:
        return self.hit_tokens / self.tokens


@dataclass
class LruCache:
    """Blocks with parents; only leaves are evicted, the one used longest ago first.

    Blocks of fewer than `full` tokens go before all others, as in the store node; with 0 they are like any.

    `leaves` is a heap of (is full, use, block). Entries outlive what they say and are checked when they come up. The
    blocks of the prompt that is being touched are not in it, so it does not evict itself.
    """

    capacity: float
    full: int = 0
    last_use: dict[Block, int] = field(default_factory=dict)
    parents: dict[Block, Block | None] = field(default_factory=dict)
    num_children: dict[Block, int] = field(default_factory=dict)
    leaves: list[tuple[bool, int, Block]] = field(default_factory=list)
    now: int = 0

    def touch(self, chain: list[Block]) -> int:
        """Use the blocks of one prompt, adding those that are missing; how many were there from the start on."""
        hits = next((index for index, block in enumerate(chain) if block not in self.last_use), len(chain))
        last: Block | None = None
        for block in chain:
            if block not in self.last_use and not self._add(block, last):
                break
            self.now += 1
            self.last_use[block] = self.now
            last = block
        if last is not None:
            self._push(last)
        return hits

    def _add(self, block: Block, parent: Block | None) -> bool:
        if len(self.last_use) >= self.capacity and not self._evict():
            return False
        self.parents[block] = parent
        self.num_children[block] = 0
        if parent is not None:
            self.num_children[parent] += 1
        return True

    def _evict(self) -> bool:
        """Drop one leaf; whether there was one."""
        while self.leaves:
            _, used, block = heapq.heappop(self.leaves)
            if self.last_use.get(block) == used and not self.num_children[block]:
                self._drop(block)
                return True
        return False

    def _drop(self, block: Block) -> None:
        del self.last_use[block], self.num_children[block]
        parent = self.parents.pop(block)
        if parent is not None:
            self.num_children[parent] -= 1
            if not self.num_children[parent]:
                self._push(parent)

    def _push(self, block: Block) -> None:
        heapq.heappush(self.leaves, (block[2] >= self.full, self.last_use[block], block))


def walk(trace: Iterable[TraceRequest], capacity_blocks: float, block_tokens: int, served: bool = False) -> WalkResult:
    """Walk `trace` through a cache of `capacity_blocks` blocks of `block_tokens` tokens.

    With `served` it is the cache of a store node that serves the trace: the blocks that a request completes while
    decoding take room too, though no prompt of a trace is made to hit them, and partial blocks are evicted first. A
    prompt's last token is never a hit: it has to be computed for there to be a first output.
    """
    cache = LruCache(capacity_blocks, full=block_tokens if served else 0)
    totals = [0, 0, 0, 0]
    for number, request in enumerate(trace):
        chain = prompt_blocks(request, block_tokens)
        hits = cache.touch(chain)
        if served:
            cache.touch(output_blocks(request, block_tokens, chain, number))
        hit_tokens = min(sum(block[2] for block in chain[:hits]), request.input_tokens - 1)
        for index, amount in enumerate((len(chain), hits, request.input_tokens, hit_tokens)):
            totals[index] += amount
    return WalkResult(*totals)


def allowed_cached_ratio(
    trace: Iterable[TraceRequest], capacity_blocks: float, block_tokens: int, served: bool = False
) -> float:
    """Cached prompt tokens over prompt tokens, as `walk` counts them."""
    return walk(trace, capacity_blocks, block_tokens, served).token_ratio


def prompt_blocks(request: TraceRequest, block_tokens: int) -> list[Block]:
    """The cache blocks of a prompt; a trace block must be a whole number of them."""
    per_id, rest = divmod(request.block_tokens, block_tokens)
    if rest:
        raise ValueError(f"block_tokens: {block_tokens} does not divide the trace's {request.block_tokens}")
    starts = range(0, request.input_tokens, block_tokens)
    return [
        (request.prefix_ids[index // per_id], index % per_id, min(block_tokens, request.input_tokens - start))
        for index, start in enumerate(starts)
    ]


def output_blocks(request: TraceRequest, block_tokens: int, prompt: list[Block], number: int) -> list[Block]:
    """The full blocks of the prompt and those completed by its output, whose last token is never in the cache."""
    num_full = request.input_tokens // block_tokens
    num_completed = (request.input_tokens + request.output_tokens - 1) // block_tokens - num_full
    return prompt[:num_full] + [(-1 - number, index, block_tokens) for index in range(num_completed)]


UNLIMITED = math.inf
