"""Full causal attention with torch, on any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from perigee.workers.attention.base import Span, StepBatch
from perigee.workers.kernels.base import Kernels


class DenseAttention:
    """Scaled dot-product attention, one sequence at a time, over contiguous views of the pool where there are."""

    def __init__(self, num_kv_heads: int, head_dim: int, kernels: Kernels) -> None:
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.kernels = kernels

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, batch: StepBatch) -> Tensor:
        """See `Attention.attend`."""
        if (
            batch.decode
            and (attended := self.kernels.attend_decode(q, keys, values, batch.decode, self.head_dim**-0.5)) is not None
        ):
            return attended
        if len(batch.spans) == 1:
            return self._attend_span(q, keys, values, batch.spans[0])
        out = torch.empty_like(q)
        for span in batch.spans:
            own = slice(span.first, span.first + span.length)
            out[own] = self._attend_span(q[own], keys, values, span)
        return out

    def _attend_span(self, q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        heads = (-1, self.num_kv_heads, self.head_dim)
        k = keys[span.pool_rows].view(heads).transpose(0, 1)  # [kv_heads, context, head_dim]
        v = values[span.pool_rows].view(heads).transpose(0, 1)
        if span.length == 1:
            return self._attend_one(q, k, v)
        return self._attend_many(q, k, v, span)

    def _attend_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A single query sees everything: the heads that share keys become rows of one product."""
        grouped = q.view(1, self.num_kv_heads, -1, self.head_dim)
        return F.scaled_dot_product_attention(grouped, k[None], v[None]).view_as(q)

    def _attend_many(self, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
        q = q.transpose(0, 1)[None]  # [1, heads, length, head_dim]
        if span.start == 0:
            out = F.scaled_dot_product_attention(q, k[None], v[None], is_causal=True, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q, k[None], v[None], attn_mask=span.mask, enable_gqa=True)
        return out[0].transpose(0, 1)
