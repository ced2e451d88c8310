"""Latent attention of whole sequences of one length, all in one call, with gradients: for training.

What a cache would hold is computed with the rest, so keys and values are the expanded ones of every head. Block-sparse
attention is a mask over full attention here: it costs no less, but its gradients are those of what is served.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from perigee.workers.attention.base import LayerCache, StepBatch
from perigee.workers.attention.latent import UpProjection
from perigee.workers.model.moba_config import MobaConfig
from perigee.workers.model.moonlight_config import MoonlightConfig


class BatchedLatentAttention:
    """A `LatentBackend` for batches whose spans are all of one length, begin at position 0, and are prompts.

    The cache holds their latents alone, in the order of the batch.
    """

    def __init__(self, config: MoonlightConfig, moba: MobaConfig | None) -> None:
        self.config = config
        self.moba = moba

    def attend(self, q: Tensor, cache: LayerCache, up: UpProjection, batch: StepBatch) -> Tensor:
        """See `LatentBackend`."""
        count, length = len(batch.spans), batch.spans[0].length
        queries = _by_head(q, count, length)
        keys, values = self._expand(cache.keys, up, count, length)
        # One width for all three is what the fast form asks for; zeros change nothing.
        width = max(keys.shape[-1], values.shape[-1])
        attended = F.scaled_dot_product_attention(
            _padded(queries, width),
            _padded(keys, width),
            _padded(values, width),
            attn_mask=mask_of(queries, keys, self.moba) if self.moba else None,
            is_causal=self.moba is None,
            scale=self.config.score_scale,
        )
        return attended[..., : self.config.value_dim].transpose(1, 2).flatten(0, 1)

    def _expand(self, latents: Tensor, up: UpProjection, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of every head, each [sequences, heads, length, ...]."""
        config = self.config
        expanded = F.linear(latents[:, : config.kv_lora_rank], up.keys_values.tensor)
        expanded = expanded.view(len(latents), up.heads, -1)
        own, values = expanded[..., : config.nope_dim], expanded[..., config.nope_dim :]
        shared = latents[:, None, config.kv_lora_rank :].expand(-1, up.heads, -1)
        return _by_head(torch.cat([own, shared], dim=-1), count, length), _by_head(values, count, length)


@torch.no_grad()
def mask_of(queries: Tensor, keys: Tensor, moba: MobaConfig) -> Tensor:
    """Which keys a query sees, 0, and which not, -inf: [sequences, heads, length, length], in the queries' dtype.

    queries, keys: [sequences, heads, length, dim]. See `perigee.workers.attention.moba.choose_blocks`, whose choice it
    is.
    """
    length, size = queries.shape[2], moba.block_size
    positions = torch.arange(length, device=queries.device)
    seen = _chosen(queries, keys, moba) | (positions[:, None] < moba.min_length)
    seen |= positions[:, None] // size == torch.arange(seen.shape[-1], device=queries.device)
    bias = torch.zeros(seen.shape, dtype=queries.dtype, device=queries.device).masked_fill_(~seen, -torch.inf)
    mask = bias.repeat_interleave(size, dim=-1)[..., :length]
    return mask.masked_fill_(positions > positions[:, None], -torch.inf)


def _chosen(queries: Tensor, keys: Tensor, moba: MobaConfig) -> Tensor:
    """Whether a query's gate chose a block: [sequences, heads, length, blocks], the last block perhaps not a whole
    one."""
    length, size = queries.shape[2], moba.block_size
    blocks, count = -(-length // size), moba.top_k - 1
    whole = F.pad(keys, (0, 0, 0, blocks * size - length)).view(*keys.shape[:2], blocks, size, -1)
    scores = queries.float() @ whole.mean(dim=3, dtype=torch.float32).mT
    own = torch.arange(length, device=queries.device)[:, None] // size
    eligible = torch.arange(blocks, device=queries.device) < own
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    best = scores.masked_fill(~eligible, -torch.inf).topk(min(count, blocks), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & eligible


def _by_head(x: Tensor, count: int, length: int) -> Tensor:
    """[sequences * length, heads, dim] as [sequences, heads, length, dim]."""
    return x.view(count, length, *x.shape[1:]).transpose(1, 2)


def _padded(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1]))
