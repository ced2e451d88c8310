"""The engine: admits sequences, steps them in batches, and moves their blocks between pages and the store's arena.

It is synchronous and belongs to one thread. A worker's `EngineThread` gives it one; benchmarks call it directly.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from perigee.kvstore.blocks import DECODE, PREFILL
from perigee.workers.engine.batcher import Active, Batcher, Chunk, Output
from perigee.workers.engine.kv_io import read_payload, write_payload
from perigee.workers.engine.runner import Runner
from perigee.workers.engine.sequence import Sequence


@dataclass(slots=True)
class EngineTotals:
    """Counts since the start; the engine fills them."""

    computed_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    last_step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What a worker reports of its engine, under the names of `WorkerReport`."""

    queued_sequences: int
    queued_prefill_tokens: int
    running_sequences: int
    context_tokens: int
    free_pages: int
    total_pages: int
    max_sequences: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step computed, and the tokens that it generated."""

    chunks: tuple[Chunk, ...]
    outputs: tuple[Output, ...]


class Engine:
    """A batcher that decides and a runner that computes."""

    def __init__(self, batcher: Batcher, runner: Runner) -> None:
        self.batcher = batcher
        self.runner = runner
        self.totals = EngineTotals()

    def step(self) -> StepResult | None:
        """Computes one batch. None when nothing was ready."""
        chunks = self.batcher.schedule()
        if not chunks:
            return None
        started = time.perf_counter()
        tokens = self.runner.run(chunks)
        outputs = self.batcher.apply(chunks, tokens)
        self._count(chunks, len(outputs), time.perf_counter() - started)
        return StepResult(tuple(chunks), tuple(outputs))

    def run_alone(self, sequence: Sequence) -> list[int]:
        """Computes a sequence from its first token to its end while there is no other; returns what it generated."""
        self.batcher.add(sequence, one_token=False)
        (active,) = self.batcher.admit()
        self.ready(active, 0)
        while self.step():
            pass
        self.batcher.remove(sequence.ref)
        return active.outputs

    def load_blocks(self, active: Active, blocks: Iterable[tuple[int, memoryview]]) -> int:
        """Copies payloads into the pages of the blocks with these indices; returns how many tokens they hold."""
        return sum(read_payload(self.runner.pool, active.pages.pages[index], payload) for index, payload in blocks)

    def ready(self, active: Active, num_loaded: int) -> None:
        """Lets the sequence run from the next step on, its first `num_loaded` tokens being loaded."""
        self.batcher.ready(active, num_loaded)
        self.totals.cached_prompt_tokens += min(active.cached, active.sequence.prompt_len)

    def join(self, active: Active, sequence: Sequence) -> None:
        """Lets a sequence decode whose every token but the last, which prefill sampled, is loaded."""
        self.batcher.extend(active, sequence)
        self.batcher.ready(active, len(sequence.token_ids) - 1)

    def save(self, active: Active, block: int, payload: memoryview) -> tuple[int, int]:
        """Copies the block of this index, as far as it is computed, into `payload`: its number of tokens and origin."""
        block_tokens = self.runner.pool.layout.block_tokens
        num_tokens = min(block_tokens, active.computed - block * block_tokens)
        is_prompt = block * block_tokens + num_tokens <= active.sequence.prompt_len
        origin = PREFILL if is_prompt else DECODE
        write_payload(self.runner.pool, active.pages.pages[block], num_tokens, origin, payload)
        return num_tokens, origin

    def load(self) -> EngineLoad:
        """The load now."""
        batcher = self.batcher
        return EngineLoad(
            queued_sequences=len(batcher.waiting),
            queued_prefill_tokens=batcher.queued_prefill_tokens,
            running_sequences=len(batcher.active),
            context_tokens=batcher.context_tokens,
            free_pages=batcher.pool.num_free,
            total_pages=batcher.pool.num_pages,
            max_sequences=batcher.limits.max_sequences,
        )

    def _count(self, chunks: list[Chunk], num_outputs: int, seconds: float) -> None:
        totals = self.totals
        totals.computed_prompt_tokens += sum(chunk.num_prompt_tokens for chunk in chunks)
        totals.output_tokens += num_outputs
        totals.steps += 1
        totals.last_step_s = seconds
