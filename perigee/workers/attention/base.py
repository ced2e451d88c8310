"""What attention reads: the paged KV pool, and the batch of one step."""

from dataclasses import dataclass
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
    pages: PageTable
    pool_rows: slice | Tensor  # rows of the pool that hold positions [0, start + length)
    dtype: torch.dtype

    @property
    def context(self) -> int:
        """Positions that the last of its tokens sees."""
        return self.start + self.length

    @cached_property
    def mask(self) -> Tensor:
        """[length, context], 0 where a token may look and -inf where not: once a step, for all layers and heads."""
        mask = torch.full((self.length, self.context), -torch.inf, dtype=self.dtype)
        return mask.triu_(self.start + 1)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The tokens of one step, those of one sequence side by side."""

    positions: Tensor  # [tokens] int64
    rows: Tensor  # [tokens] int64: where in the pool each token's keys and values go
    spans: tuple[Span, ...]
    decode: DecodeBatch | None  # where every sequence has one token


class KVPool:
    """The KVCache of all active sequences: `[layers, parts, pages * page_tokens, width]`."""

    def __init__(self, layout: PayloadLayout, num_pages: int) -> None:
        self.layout = layout
        rows = num_pages * layout.block_tokens
        # Zeros also touch the memory, so that no step pays for a first touch.
        self.tensor = torch.zeros(layout.num_layers, layout.parts, rows, layout.width, dtype=TORCH_DTYPES[layout.dtype])
        self.layers = [tuple(layer.unbind(0)) for layer in self.tensor.unbind(0)]

    def page(self, page: int, num_tokens: int) -> Tensor:
        """The first `num_tokens` of a page: `[layers, parts, tokens, width]`, a view."""
        first = page * self.layout.block_tokens
        return self.tensor[:, :, first : first + num_tokens]


class Attention(Protocol):
    """Attention over one layer's cached keys and values."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, batch: StepBatch) -> Tensor:
        """Causal attention of every token to its own sequence, itself included.

        q: [tokens, heads, head_dim]; keys, values: the layer's pool, [rows, kv_heads * head_dim], in which the step's
        own tokens are written already. Returns [tokens, heads, head_dim].
        """
        ...
