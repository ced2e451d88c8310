"""Which sizes are measured: few, spread geometrically, the cheap ones first."""

from collections.abc import Iterator
from dataclasses import dataclass

from perigee.profiling.cluster import Card, Worker
from perigee.profiling.probe import MAX_OUTPUT_TOKENS

_FIRST_TOKENS, _GROWTH = 32, 4
_SHORT_PROMPT = 64


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a worker can hold. `limit` is the longest prompt to measure, and `pool_tokens` all its pages."""

    limit: int
    block_tokens: int
    pool_tokens: int
    max_sequences: int

    @classmethod
    def of(cls, worker: Worker, card: Card, max_tokens: int) -> "Sizes":
        pool_tokens = worker.load.total_pages * card.block_tokens
        limit = min(max_tokens, card.max_context - MAX_OUTPUT_TOKENS, pool_tokens - MAX_OUTPUT_TOKENS)
        return cls(limit, card.block_tokens, pool_tokens, worker.load.max_sequences)

    def lengths(self) -> list[int]:
        """Prompt lengths from short to `limit`."""
        grown = (_FIRST_TOKENS * _GROWTH**power for power in range(20))
        return [*(length for length in grown if length < self.limit), self.limit]

    def prefills(self) -> list[tuple[int, int]]:
        """(new, prefix): every length without a prefix, and shorter ones after the long prefixes."""
        lengths = self.lengths()
        prefixes = [self._whole_blocks(prefix) for prefix in (self.limit // 4, self.limit // 2)]
        after = [(new, prefix) for prefix in prefixes for new in lengths if prefix and new + prefix <= self.limit]
        return sorted([(new, 0) for new in lengths] + after, key=sum)

    def steps(self) -> list[tuple[int, int]]:
        """(batch, prompt tokens): every batch of short contexts, and some of long ones."""
        contexts = [min(_SHORT_PROMPT, self.limit), self.limit // 4, self.limit]
        return [(batch, context) for context in contexts for batch in self._batches() if self._fits(batch, context)]

    def _batches(self) -> Iterator[int]:
        batch = 1
        while batch < self.max_sequences:
            yield batch
            batch *= 2
        yield self.max_sequences

    def _fits(self, batch: int, context: int) -> bool:
        """With a page more for the block that is not full."""
        return batch * (context + MAX_OUTPUT_TOKENS + self.block_tokens) <= self.pool_tokens

    def _whole_blocks(self, tokens: int) -> int:
        return tokens // self.block_tokens * self.block_tokens
