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
        k, v = keys[span.pool_rows].view(heads), values[span.pool_rows].view(heads)
        scale = self.head_dim**-0.5
        attended = self.kernels.attend_chunk(q, k, v, span.start, scale)
        return attend_span(q, k, v, span, scale) if attended is None else attended


def attend_span(q: Tensor, keys: Tensor, values: Tensor, span: Span, scale: float) -> Tensor:
    """Causal attention of one sequence's part of a step, in torch.

    q: [length, heads, head_dim]; keys: [context, kv_heads, head_dim]; values: [context, kv_heads, value_dim]. Returns
    [length, heads, value_dim].
    """
    # Torch is fast on the CPU only where queries and values have one size.
    padded = F.pad(values, (0, max(0, keys.shape[-1] - values.shape[-1])))
    q, k, v = (t.transpose(0, 1)[None] for t in (q, keys, padded))
    if span.length == 1:  # sees everything: the heads that share keys become rows of one product
        grouped = q.reshape(1, k.shape[1], -1, k.shape[-1])
        out = F.scaled_dot_product_attention(grouped, k, v, scale=scale).reshape(1, q.shape[1], 1, -1)
    elif span.start == 0:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=span.mask, scale=scale, enable_gqa=True)
    return out[0, ..., : values.shape[-1]].transpose(0, 1)
