"""Mixture of block attention (MoBA, section 2.2 and algorithm 1): a query attends to its own block and a few before it.

The gate scores a block by ⟨q, c⟩ with its centroid c, the mean of its keys. For latent attention the mean of what is
cached does for every head at once, since the mean commutes with what is linear. A head's keys are [U_k c_t, r_t] of the
latents c_t and rotated keys r_t, so with means c̄ and r̄ over a block's tokens

    ⟨q, mean_t [U_k c_t, r_t]⟩ = ⟨q, [U_k c̄, r̄]⟩ = ⟨[U_kᵀ q_nope, q_rope], [c̄, r̄]⟩:

the expanded query with the expanded centroid, or the absorbed query with the cached one, give the score exactly.

What is chosen is attended block by block, the queries that chose a block packed together, and the parts are merged by
their log-sum-exp. This is the torch form, for any device; `perigee.workers.kernels` has another for the CPU.
"""

import torch
from torch import Tensor

from perigee.workers.attention.varlen import Varlen


def choose_blocks(q: Tensor, centroids: Tensor, start: int, block_size: int, count: int) -> Tensor:
    """The `count` blocks before its own that each query's gate likes best: [length, heads, count], -1 for none.

    q: [length, heads, dim], at the positions from `start` on; centroids: [blocks, kv_heads, dim] of the complete blocks
    before the last query's own. Only blocks before a query's own are eligible, so none of the future ever is.
    """
    length, heads, dim = q.shape
    blocks, kv_heads, _ = centroids.shape
    own = (torch.arange(start, start + length, device=q.device) // block_size)[:, None, None]
    grouped = q.float().view(length, kv_heads, -1, dim)
    scores = torch.einsum("lkgd,bkd->lkgb", grouped, centroids.float()).reshape(length, heads, blocks)
    scores = scores.masked_fill(torch.arange(blocks, device=q.device) >= own, -torch.inf)
    best = scores.topk(min(count, blocks), dim=-1)
    chosen = best.indices.masked_fill(best.values == -torch.inf, -1)
    return torch.nn.functional.pad(chosen, (0, count - chosen.shape[-1]), value=-1)


def attend_sparse(
    q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, chosen: Tensor, block_size: int, varlen: Varlen
) -> Tensor:
    """Attention of each query to its own block, causally, and to those chosen: [length, heads, value_dim].

    q: [length, heads, dim], at the positions from `start` on; keys: [start + length, kv_heads, dim]; values alike;
    chosen: as `choose_blocks` returns it.
    """
    own, own_logsum = _attend_own(q, keys, values, start, scale, block_size, varlen)
    picked = (chosen >= 0).nonzero()  # [pairs, 3]: query, head, place
    if len(picked) == 0:
        return own
    parts, part_logsums = _attend_chosen(q, keys, values, chosen, picked, scale, block_size, varlen)
    return merge(torch.cat([own[:, :, None], parts], dim=2), torch.cat([own_logsum[..., None], part_logsums], dim=2))


def _attend_own(
    q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, block_size: int, varlen: Varlen
) -> tuple[Tensor, Tensor]:
    """Each query with its own block up to itself: a sequence a block. [length, heads, value_dim], [length, heads]."""
    stop = start + len(q)
    first = start // block_size * block_size
    edges = [*range(first, stop, block_size), stop]
    cu_k = torch.tensor([edge - first for edge in edges], dtype=torch.int32, device=q.device)
    cu_q = (cu_k - (start - first)).clamp(min=0)
    longest = min(block_size, stop - first)
    out, logsum = varlen(
        q, keys[first:], values[first:], cu_q, cu_k, longest, longest, softmax_scale=scale, causal=True
    )
    return out, logsum.T


def _attend_chosen(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    chosen: Tensor,
    picked: Tensor,
    scale: float,
    block_size: int,
    varlen: Varlen,
) -> tuple[Tensor, Tensor]:
    """Each query with each block it chose, whole: [length, heads, count, value_dim], [length, heads, count]."""
    kv_heads = keys.shape[1]
    query, head, place = picked.unbind(1)
    # One packed sequence for each block and key head that somebody chose.
    segment = chosen[query, head, place] * kv_heads + head // (q.shape[1] // kv_heads)
    order = segment.argsort(stable=True)
    counts = segment.bincount()
    segments = counts.nonzero()[:, 0]
    counts = counts[segments]
    query, head, place = query[order], head[order], place[order]
    packed_keys, packed_values = (_blocks(t, segments, block_size) for t in (keys, values))
    out, logsum = varlen(
        q[query, head][:, None],
        packed_keys,
        packed_values,
        _edges(counts),
        _edges(torch.full_like(counts, block_size)),
        int(counts.max()),
        block_size,
        softmax_scale=scale,
        causal=False,
    )
    where = (query, head, place)
    parts = out.new_zeros(*chosen.shape, out.shape[-1]).index_put(where, out[:, 0])
    logsums = logsum.new_full(chosen.shape, -torch.inf).index_put(where, logsum[0])
    return parts, logsums


def _blocks(pool: Tensor, segments: Tensor, block_size: int) -> Tensor:
    """The blocks of one head each that `segments` names, one after the other: [segments * block_size, 1, dim]."""
    kv_heads = pool.shape[1]
    blocks = len(pool) // block_size
    complete = pool[: blocks * block_size].reshape(blocks, block_size, *pool.shape[1:])
    return complete[segments // kv_heads, :, segments % kv_heads].flatten(0, 1)[:, None]


def _edges(counts: Tensor) -> Tensor:
    """Where each of so many begins and the last ends, [counts + 1] int32."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def merge(parts: Tensor, logsums: Tensor) -> Tensor:
    """Attention to all keys, [..., value_dim], from attention to disjoint parts of them, [..., parts, value_dim], and
    the log-sum-exp of the scores of each, [..., parts]."""
    merged: Tensor = torch.einsum("...pd,...p->...d", parts.float(), logsums.softmax(dim=-1))
    return merged.to(parts.dtype)
