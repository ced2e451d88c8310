"""Grouped-query attention: heads share the cached keys and values of their group."""

import torch
from torch import Tensor

from perigee.workers.attention.base import LayerCache, Span, StepBatch
from perigee.workers.attention.chunks import ChunkAttention
from perigee.workers.attention.decode import attend_decode
from perigee.workers.kernels.base import Kernels
from perigee.workers.model.moba_config import MobaConfig


class GroupedAttention:
    """All sequences at once where each has one token, else one at a time, over views of the pool where there are."""

    def __init__(self, num_kv_heads: int, head_dim: int, kernels: Kernels, moba: MobaConfig | None) -> None:
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.kernels = kernels
        self.chunks = ChunkAttention(head_dim**-0.5, kernels, moba)

    def attend(self, q: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        """See `Attention.attend`."""
        assert cache.values is not None
        cache.summarise(batch.full_pages)
        if batch.decode:
            attended = attend_decode(q, cache, cache.values, batch, batch.decode, self.chunks)
            if attended is not None:
                return attended
        if len(batch.spans) == 1:
            return self._attend_span(q, cache, cache.values, batch.spans[0])
        out = torch.empty_like(q)
        for span in batch.spans:
            own = slice(span.first, span.first + span.length)
            out[own] = self._attend_span(q[own], cache, cache.values, span)
        return out

    def _attend_span(self, q: Tensor, cache: LayerCache, values: Tensor, span: Span) -> Tensor:
        heads = (-1, self.num_kv_heads, self.head_dim)
        k, v = cache.keys[span.pool_rows].view(heads), values[span.pool_rows].view(heads)
        block_size = self.chunks.moba.block_size if self.chunks.moba else 0
        return self.chunks.attend(q, k, v, span, lambda: cache.block_centroids(span, block_size).view(heads))
