"""Attention over cached latents (DeepSeek-V2, 2.1): absorbed where queries are few, expanded where they are many.

A head's key is [U_k c, r] and its value U_v c, of the cached latent c and rotated key r. So its score is

    ⟨q, k⟩ = ⟨q_nope, U_k c⟩ + ⟨q_rope, r⟩ = ⟨[U_kᵀ q_nope, q_rope], [c, r]⟩,

and the weighted sum of its values is U_v applied to that of the latents. *Absorbed*, all heads attend to the one cached
row, and nothing is computed of a cached token but its scores. *Expanded*, every head's keys and values are computed
first, and each score then costs a third.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perigee.workers.attention.base import Span, StepBatch
from perigee.workers.kernels.base import Kernels
from perigee.workers.model.moonlight_config import MoonlightConfig


class UpProjection(nn.Module):
    """U_k and U_v of each head: from a latent to what the head's keys and values have beside the rotated part."""

    def __init__(self, config: MoonlightConfig) -> None:
        super().__init__()
        heads, rank = config.num_heads, config.kv_lora_rank
        self.nope_dim = config.nope_dim
        self.weight = nn.Parameter(torch.empty(heads, config.nope_dim + config.value_dim, rank))
        self.absorbing = torch.empty(0)  # U_kᵀ, [heads, rank, nope_dim]; `prepare` fills it

    def prepare(self) -> None:
        """Lays U_kᵀ out row by row, as products with few queries read it."""
        self.absorbing = self.keys.transpose(1, 2).contiguous()

    @property
    def keys(self) -> Tensor:  # [heads, nope_dim, rank]
        return self.weight[:, : self.nope_dim]

    @property
    def values(self) -> Tensor:  # [heads, value_dim, rank]
        return self.weight[:, self.nope_dim :]


class LatentAttention:
    """Full causal attention over latents, on any device."""

    def __init__(self, config: MoonlightConfig, kernels: Kernels) -> None:
        self.config = config
        self.kernels = kernels

    def attend(self, q: Tensor, latents: Tensor, up: UpProjection, batch: StepBatch) -> Tensor:
        """Causal attention of every token to its own sequence, itself included.

        q: [tokens, heads, nope_dim + rope_dim], rotated; latents: the layer's pool, [rows, rank + rope_dim], in which
        the step's own tokens are written already. Returns [tokens, heads, value_dim].
        """
        if batch.decode:
            absorbed = self._absorb(q, up)
            values = latents[:, : self.config.kv_lora_rank]
            attended = self.kernels.attend_decode(absorbed, latents, values, batch.decode, self.config.score_scale)
            if attended is not None:
                return self.kernels.linear_heads(attended, up.values)
        if len(batch.spans) == 1:
            return self._attend_span(q, latents, up, batch.spans[0])
        out = q.new_empty(*q.shape[:2], self.config.value_dim)
        for span in batch.spans:
            own = slice(span.first, span.first + span.length)
            out[own] = self._attend_span(q[own], latents, up, span)
        return out

    def _attend_span(self, q: Tensor, latents: Tensor, up: UpProjection, span: Span) -> Tensor:
        attend = self._absorbed if self.absorbs(span.length, span.context) else self._expanded
        return attend(q, latents[span.pool_rows], up, span)

    def absorbs(self, length: int, context: int) -> bool:
        """Whether the absorbed form takes fewer operations for the last `length` tokens of `context`, a head."""
        config = self.config
        rank, head_dims = config.kv_lora_rank, config.nope_dim + config.value_dim
        scores = length * (context - (length - 1) / 2)
        absorbed = length * rank * head_dims + scores * (2 * rank + config.rope_dim)
        expanded = context * rank * head_dims + scores * (head_dims + config.rope_dim)
        return absorbed < expanded

    def _absorb(self, q: Tensor, up: UpProjection) -> Tensor:  # [tokens, heads, rank + rope_dim]
        nope, turned = q[..., : self.config.nope_dim], q[..., self.config.nope_dim :]
        return torch.cat([self.kernels.linear_heads(nope, up.absorbing), turned], dim=-1)

    def _absorbed(self, q: Tensor, latents: Tensor, up: UpProjection, span: Span) -> Tensor:
        queries = self._absorb(q, up).transpose(0, 1)  # [heads, length, rank + rope_dim]
        keys = latents.expand(1, -1, -1)  # one head
        values = keys[..., : self.config.kv_lora_rank]
        attended = self._scaled_dot_product(queries, keys, values, span)
        return self.kernels.linear_heads(attended.transpose(0, 1), up.values)

    def _expanded(self, q: Tensor, latents: Tensor, up: UpProjection, span: Span) -> Tensor:
        config, context = self.config, len(latents)
        latent, turned = latents[:, : config.kv_lora_rank], latents[:, config.kv_lora_rank :]
        expanded = self.kernels.linear(latent, up.weight.flatten(0, 1)).view(context, config.num_heads, -1)
        nope, values = expanded[..., : config.nope_dim], expanded[..., config.nope_dim :]
        keys = torch.cat([nope, turned[:, None].expand(-1, config.num_heads, -1)], dim=-1).transpose(0, 1)
        attended = self._scaled_dot_product(q.transpose(0, 1), keys, values.transpose(0, 1), span)
        return attended.transpose(0, 1)

    def _scaled_dot_product(self, q: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """q [heads, length, dim] over keys and values [kv_heads, context, ...]: [heads, length, value_dim]."""
        # Torch is fast on the CPU only where queries and values have one size.
        padded = F.pad(values, (0, keys.shape[-1] - values.shape[-1]))
        out = F.scaled_dot_product_attention(
            q[None],
            keys[None],
            padded[None],
            attn_mask=span.mask,
            is_causal=span.start == 0 and span.length > 1,
            scale=self.config.score_scale,
            enable_gqa=True,
        )
        return out[0, ..., : values.shape[-1]]
