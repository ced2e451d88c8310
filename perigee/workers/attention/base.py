"""What attention reads: the paged KV pool, and the batch of one step."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from perigee.kvstore.blocks import PayloadLayout
from perigee.workers.engine.pages import PageTable
from perigee.workers.kernels.base import DecodeBatch

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Span:
    """One sequence's part of a step: rows `first` to `first + length` of the batch, positions from `start` on."""

    first: int
    length: int
    start: int
    prompt_len: int
    pages: PageTable
    dtype: torch.dtype

    @property
    def context(self) -> int:
        """Positions that the last of its tokens sees."""
        return self.start + self.length

    @cached_property
    def table(self) -> Tensor:
        """The pages, [pages] int64."""
        return torch.tensor(self.pages.pages, dtype=torch.int64)

    @cached_property
    def pool_rows(self) -> slice | Tensor:
        """The pool's rows of the positions before `context`, as a slice where the pages allow it: then attention copies
        nothing."""
        if self.pages.is_contiguous:
            first = self.pages.row(0)
            return slice(first, first + self.context)
        return torch.tensor(self.pages.rows(0, self.context))

    @cached_property
    def mask(self) -> Tensor:
        """[length, context], 0 where a token may look and -inf where not: once a step, for all layers and heads."""
        mask = torch.full((self.length, self.context), -torch.inf, dtype=self.dtype)
        return mask.triu_(self.start + 1)

    def piece(self, first: int, stop: int) -> "Span":
        """The part of it at the positions [first, stop)."""
        return replace(self, first=self.first + first - self.start, length=stop - first, start=first)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The tokens of one step, those of one sequence side by side."""

    positions: Tensor  # [tokens] int64
    rows: Tensor  # [tokens] int64: where in the pool each token's keys and values go
    spans: tuple[Span, ...]
    decode: DecodeBatch | None  # where every sequence has one token
    full_pages: Tensor  # [pages] int64: those that this step fills to the end


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's part of the pool."""

    keys: Tensor  # [rows, width]; latents and rotated keys in one where a model caches those
    values: Tensor | None  # [rows, width]
    centroids: Tensor | None  # [pages, width] float32: the means of the keys of full pages, where a gate wants them

    def summarise(self, pages: Tensor) -> None:
        """Fills the centroids of `pages`, which are full."""
        if self.centroids is not None and len(pages):
            num_pages, width = self.centroids.shape
            tokens = self.keys.view(num_pages, -1, width)[pages]
            self.centroids[pages] = tokens.mean(dim=1, dtype=torch.float32)

    def block_centroids(self, span: Span, block_size: int) -> Tensor:
        """[blocks, width]: the means of the blocks of `block_size` tokens before that of the span's last position."""
        assert self.centroids is not None
        per_block = block_size // span.pages.page_tokens
        count = (span.context - 1) // block_size
        return (
            self.centroids[span.table[: count * per_block]].view(count, per_block, self.centroids.shape[1]).mean(dim=1)
        )


class KVPool:
    """The KVCache of all active sequences: `[layers, parts, pages * page_tokens, width]`."""

    def __init__(self, layout: PayloadLayout, num_pages: int, *, with_centroids: bool = False) -> None:
        self.layout = layout
        rows = num_pages * layout.block_tokens
        # Zeros also touch the memory, so that no step pays for a first touch.
        self.tensor = torch.zeros(layout.num_layers, layout.parts, rows, layout.width, dtype=TORCH_DTYPES[layout.dtype])
        self.centroids = torch.zeros(layout.num_layers, num_pages, layout.width) if with_centroids else None
        self.layers = [self._layer(index) for index in range(layout.num_layers)]

    def page(self, page: int, num_tokens: int) -> Tensor:
        """The first `num_tokens` of a page: `[layers, parts, tokens, width]`, a view."""
        first = page * self.layout.block_tokens
        return self.tensor[:, :, first : first + num_tokens]

    def _layer(self, index: int) -> LayerCache:
        parts = self.tensor[index]
        centroids = None if self.centroids is None else self.centroids[index]
        return LayerCache(parts[0], parts[1] if len(parts) > 1 else None, centroids)


class Attention(Protocol):
    """Attention over one layer's cached keys and values."""

    def attend(self, q: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        """Causal attention of every token to its own sequence, itself included.

        q: [tokens, heads, head_dim]; in `cache` the step's own tokens are written already. Returns [tokens, heads,
        value_dim].
        """
        ...
