"""Attention over many sequences of different lengths, packed one after the other.

`attend_varlen` has the signature, the layout and the meaning of FlashAttention's `flash_attn_varlen_func`: what is
packed and merged for it on a GPU is packed, merged and tested for this function on the CPU.
"""

from typing import Protocol

import torch
from torch import Tensor


class Varlen(Protocol):
    """Attention of packed queries to packed keys, with the log-sum-exp of each query's scores."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """q: [queries, heads, dim]; k: [keys, kv_heads, dim]; v: [keys, kv_heads, value_dim].

        cu_seqlens: [sequences + 1] int32, where each begins. A causal mask is aligned at the end: the last query of a
        sequence sees its last key.

        Returns [queries, heads, value_dim] and [heads, queries] float32.
        """
        ...


def attend_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """See `Varlen`. In torch, sequence by sequence, differentiable."""
    outputs, logsums = [], []
    q_edges, k_edges = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q_edges) - 1):
        queries = slice(q_edges[i], q_edges[i + 1])
        keys = slice(k_edges[i], k_edges[i + 1])
        out, logsum = _attend_one(q[queries], k[keys], v[keys], softmax_scale, causal)
        outputs.append(out)
        logsums.append(logsum)
    return torch.cat(outputs), torch.cat(logsums, dim=1)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """One sequence: [queries, heads, value_dim], [heads, queries]."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1).float() for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if causal:
        ahead = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(ahead, -torch.inf)
    logsum = scores.logsumexp(dim=-1)
    weights = (scores - logsum[..., None]).exp()
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype), logsum
