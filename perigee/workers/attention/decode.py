"""Attention where every sequence of a step has one token, over its pages: to all of them, or to those a gate chose."""

import torch
from torch import Tensor

from perigee.workers.attention.base import LayerCache, Span, StepBatch
from perigee.workers.attention.chunks import ChunkAttention
from perigee.workers.kernels.base import DecodeBatch
from perigee.workers.model.moba_config import MobaConfig


def attend_decode(
    q: Tensor, cache: LayerCache, values: Tensor, batch: StepBatch, decode: DecodeBatch, chunks: ChunkAttention
) -> Tensor | None:
    """q: [sequences, heads, dim]; values: [rows, kv_heads * value_dim] of the pool.

    Returns [sequences, heads, value_dim]; None if the kernels leave this shape to torch.
    """
    moba = chunks.moba
    if moba is None or not any(is_sparse(span, moba) for span in batch.spans):
        return chunks.kernels.attend_decode(q, cache.keys, values, decode, chunks.scale)
    return _attend_chosen(q, cache, values, batch.spans, chunks, moba)


def is_sparse(span: Span, moba: MobaConfig) -> bool:
    """Whether its first position chooses blocks."""
    first, stop = moba.sparse_from(span.prompt_len)
    return first <= span.start < stop


def _attend_chosen(
    q: Tensor, cache: LayerCache, values: Tensor, spans: tuple[Span, ...], chunks: ChunkAttention, moba: MobaConfig
) -> Tensor | None:
    """Each head of each sequence has pages of its own choice: for the kernel, a sequence with one head."""
    sequences, heads, dim = q.shape
    kv_heads = cache.keys.shape[1] // dim
    page_tokens = spans[0].pages.page_tokens
    tables, contexts = zip(*(_pages(q[i], cache, span, moba, kv_heads) for i, span in enumerate(spans)), strict=True)
    width = max(table.shape[1] for table in tables)
    pages = torch.cat([torch.nn.functional.pad(table, (0, width - table.shape[1])) for table in tables]).int()
    seen = torch.tensor(contexts).repeat_interleave(heads)
    group, value_dim = heads // kv_heads, values.shape[1] // kv_heads
    out = q.new_empty(sequences, heads, value_dim)
    for kv_head in range(kv_heads):
        own = slice(kv_head * group, (kv_head + 1) * group)
        mine = torch.arange(sequences * heads).view(sequences, heads)[:, own].flatten()
        batch = DecodeBatch(pages[mine], seen[mine], page_tokens)
        keys_of = cache.keys[:, kv_head * dim : (kv_head + 1) * dim]
        values_of = values[:, kv_head * value_dim : (kv_head + 1) * value_dim]
        one_head = q[:, own].reshape(-1, 1, dim)
        attended = chunks.kernels.attend_decode(one_head, keys_of, values_of, batch, chunks.scale)
        if attended is None:
            return None
        out[:, own] = attended.view(sequences, group, value_dim)
    return out


def _pages(q: Tensor, cache: LayerCache, span: Span, moba: MobaConfig, kv_heads: int) -> tuple[Tensor, int]:
    """The pages that each head of one query [heads, dim] attends to, [heads, pages], and how many tokens they hold."""
    heads, block_size = len(q), moba.block_size
    per_block = block_size // span.pages.page_tokens
    own_first = span.start // block_size * block_size
    table = span.table
    last = -(-span.context // span.pages.page_tokens)
    count = min(moba.top_k - 1, own_first // block_size)
    if not is_sparse(span, moba):
        return table[:last].expand(heads, -1), span.context
    own = table[own_first // span.pages.page_tokens : last].expand(heads, -1)
    if count == 0:
        return own, span.context - own_first
    centroids = cache.block_centroids(span, block_size).view(-1, kv_heads, q.shape[-1])
    grouped = q.float().view(kv_heads, -1, q.shape[-1])
    scores = torch.einsum("kgd,bkd->kgb", grouped, centroids).flatten(0, 1)
    blocks = table[: own_first // span.pages.page_tokens].view(-1, per_block)
    chosen = blocks[scores.topk(count, dim=-1).indices].flatten(1)
    return torch.cat([chosen, own], dim=1), count * block_size + span.context - own_first
