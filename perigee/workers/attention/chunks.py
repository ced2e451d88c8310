"""Attention of one sequence's part of a step: all of it causal and full, or some positions block-sparse."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from perigee.workers.attention.base import Span
from perigee.workers.attention.dense import attend_dense
from perigee.workers.attention.flash import select_varlen
from perigee.workers.attention.moba import attend_sparse
from perigee.workers.kernels.base import Kernels
from perigee.workers.model.moba_config import MobaConfig


class ChunkAttention:
    """By the model's kernels where they do the shape, else in torch."""

    def __init__(self, scale: float, kernels: Kernels, moba: MobaConfig | None) -> None:
        self.scale = scale
        self.kernels = kernels
        self.moba = moba

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        span: Span,
        centroids: Callable[[], Tensor],
        shared_keys: Tensor | None = None,
    ) -> Tensor:
        """q: [length, heads, dim]; keys, values: [context, kv_heads, ...]; centroids: those of the complete blocks,
        [blocks, kv_heads, dim], for a gate that needs them; shared_keys: [context, rest of dim] that every head's keys
        end with. Returns [length, heads, value_dim].
        """
        parts = list(self._parts(span))
        if len(parts) == 1:
            return self._attend_part(q, keys, values, span, centroids, shared_keys, parts[0][2])
        out = q.new_empty(*q.shape[:2], values.shape[-1])
        for first, stop, sparse in parts:
            piece = span.piece(first, stop)
            seen = slice(0, piece.context)
            shared = None if shared_keys is None else shared_keys[seen]
            own = slice(first - span.start, stop - span.start)
            out[own] = self._attend_part(q[own], keys[seen], values[seen], piece, centroids, shared, sparse)
        return out

    def _parts(self, span: Span) -> Iterator[tuple[int, int, bool]]:
        """Runs of positions that attend alike: first, stop, and whether they choose blocks."""
        first, stop = self.moba.sparse_from(span.prompt_len) if self.moba else (0, 0)
        edges = (span.start, *(min(max(edge, span.start), span.context) for edge in (first, stop)), span.context)
        for index in range(3):
            if edges[index] < edges[index + 1]:
                yield edges[index], edges[index + 1], index == 1

    def _attend_part(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        span: Span,
        centroids: Callable[[], Tensor],
        shared_keys: Tensor | None,
        sparse: bool,
    ) -> Tensor:
        if sparse:
            return self._attend_sparse(q, keys, values, span, self.choose(q, span, centroids), shared_keys)
        attended = self.kernels.attend_chunk(q, keys, values, span.start, self.scale, shared_keys)
        if attended is not None:
            return attended
        return attend_dense(q, with_shared(keys, shared_keys), values, span, self.scale)

    def choose(self, q: Tensor, span: Span, centroids: Callable[[], Tensor]) -> Tensor:
        """The gate: [length, heads, top_k - 1], blocks before each query's own."""
        assert self.moba
        return self.kernels.choose_blocks(q, centroids(), span.start, self.moba.block_size, self.moba.top_k - 1)

    def _attend_sparse(
        self, q: Tensor, keys: Tensor, values: Tensor, span: Span, chosen: Tensor, shared_keys: Tensor | None
    ) -> Tensor:
        assert self.moba
        block_size = self.moba.block_size
        attended = self.kernels.attend_sparse(q, keys, values, span.start, self.scale, chosen, block_size, shared_keys)
        if attended is not None:
            return attended
        keys, varlen = with_shared(keys, shared_keys), select_varlen(q.device.type)
        return attend_sparse(q, keys, values, span.start, self.scale, chosen, block_size, varlen)


def with_shared(keys: Tensor, shared: Tensor | None) -> Tensor:
    """Keys [context, kv_heads, own] with what all heads share, [context, rest], at the end of each."""
    if shared is None:
        return keys
    return torch.cat([keys, shared[:, None].expand(-1, keys.shape[1], -1)], dim=-1)
