"""Full causal attention in torch."""

from torch import Tensor
from torch.nn import functional as F

from perigee.workers.attention.base import Span


def attend_dense(q: Tensor, keys: Tensor, values: Tensor, span: Span, scale: float) -> Tensor:
    """Full causal attention of one sequence's part of a step, in torch, on any device.

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
