"""Runs one step of the model over the paged KV pool."""

import torch

from perigee.kvstore.blocks import num_blocks
from perigee.workers.attention.base import KVPool, Span, StepBatch
from perigee.workers.engine.batcher import Active, Chunk
from perigee.workers.engine.recorded import RecordedSteps
from perigee.workers.engine.sampler import Draw, sample
from perigee.workers.engine.sequence import Token
from perigee.workers.kernels.base import DecodeBatch
from perigee.workers.model.decoder import Decoder


class Runner:
    """The model and its KV pool. `run` is all that the engine asks of them."""

    def __init__(self, model: Decoder, pool: KVPool, eos_token_ids: frozenset[int]) -> None:
        self.model = model
        self.pool = pool
        self.eos_token_ids = eos_token_ids
        self._steps = RecordedSteps(model, pool)

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[Token]:
        """Computes the chunks and samples a token for each that reaches its sequence's end, in their order."""
        token_ids = torch.tensor([t for c in chunks for t in c.active.tokens(c.start, c.stop)])
        hidden = self._steps.hidden(token_ids, self._batch(chunks))
        ends = _sampled_rows(chunks)
        if not ends:
            return []
        logits = self.model.logits(hidden[ends])
        return sample(logits, [self._draw(chunk.active) for chunk in chunks if chunk.samples])

    def _batch(self, chunks: list[Chunk]) -> StepBatch:
        positions = [p for c in chunks for p in range(c.start, c.stop)]
        rows = [row for c in chunks for row in c.active.pages.rows(c.start, c.stop)]
        spans: list[Span] = []
        first = 0
        for chunk in chunks:
            spans.append(self._span(chunk, first))
            first += chunk.length
        decode = _decode_batch(chunks, self.pool.layout.block_tokens)
        full = torch.tensor([page for c in chunks for page in _full_pages(c)], dtype=torch.int64)
        return StepBatch(torch.tensor(positions), torch.tensor(rows), tuple(spans), decode, full)

    def _span(self, chunk: Chunk, first: int) -> Span:
        pages = chunk.active.pages
        prompt_len = chunk.active.sequence.prompt_len
        return Span(first, chunk.length, chunk.start, prompt_len, pages, self.pool.tensor.dtype)

    def _draw(self, active: Active) -> Draw:
        sequence = active.sequence
        outputs = list(active.tokens(sequence.prompt_len, active.num_tokens))
        return Draw(sequence.sampling, sequence.seed, sequence.draw, outputs, self.eos_token_ids)


def _decode_batch(chunks: list[Chunk], page_tokens: int) -> DecodeBatch | None:
    """The batch as one query a sequence, if that is what it is. Page tables double, so that shapes are few."""
    if any(chunk.length > 1 for chunk in chunks):
        return None
    contexts = [chunk.stop for chunk in chunks]
    width = 1 << (num_blocks(max(contexts), page_tokens) - 1).bit_length()
    tables = [chunk.active.pages.pages[:width] for chunk in chunks]
    padded = [table + (0,) * (width - len(table)) for table in tables]
    return DecodeBatch(torch.tensor(padded, dtype=torch.int32), torch.tensor(contexts), page_tokens)


def _full_pages(chunk: Chunk) -> tuple[int, ...]:
    """The pages that this chunk fills to the end."""
    pages = chunk.active.pages
    return pages.pages[chunk.start // pages.page_tokens : chunk.stop // pages.page_tokens]


def _sampled_rows(chunks: list[Chunk]) -> list[int]:
    """The batch rows whose next token is wanted: the last of each chunk that reaches its sequence's end."""
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += chunk.length
        if chunk.samples:
            rows.append(end - 1)
    return rows
