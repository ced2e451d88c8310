"""Attention over cached latents (DeepSeek-V2, 2.1): absorbed where queries are few, expanded where they are many.

A head's key is [U_k c, r] and its value U_v c, of the cached latent c and rotated key r. So its score is

    ⟨q, k⟩ = ⟨q_nope, U_k c⟩ + ⟨q_rope, r⟩ = ⟨[U_kᵀ q_nope, q_rope], [c, r]⟩,

and the weighted sum of its values is U_v applied to that of the latents. *Absorbed*, all heads attend to the one cached
row, and nothing is computed of a cached token but its scores. *Expanded*, every head's keys and values are computed
first, and each score then costs a third.
"""

import torch
from torch import Tensor, nn

from perigee.workers.attention.base import Span, StepBatch
from perigee.workers.attention.dense import attend_span
from perigee.workers.kernels.base import Kernels, Matrix
from perigee.workers.model.layers import Prepared
from perigee.workers.model.moonlight_config import MoonlightConfig


class UpProjection(Prepared):
    """U_k and U_v of each head: from a latent to what the head's keys and values have beside the rotated part."""

    def __init__(self, config: MoonlightConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.nope_dim = config.nope_dim
        self.heads, self.rank = config.num_heads, config.kv_lora_rank
        self.weight = nn.Parameter(torch.empty(self.heads, config.nope_dim + config.value_dim, self.rank))
        self._take(Matrix(self._transposed_keys()), Matrix(self.weight))

    def prepare(self) -> None:
        self._take(*self.kernels.matrices(self._transposed_keys(), self.weight))

    def _transposed_keys(self) -> Tensor:
        return self.weight[:, : self.nope_dim].transpose(1, 2).contiguous()

    def _take(self, absorbing: Matrix, both: Matrix) -> None:
        self.absorbing = absorbing  # U_kᵀ, [heads, rank, nope_dim]
        self.keys_values = Matrix(both.tensor.view(-1, self.rank), both.packed)  # of all heads, U_k then U_v of each
        self.values = Matrix(both.tensor[:, self.nope_dim :], both.packed)  # U_v, [heads, value_dim, rank]


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
                return self._values(attended, up)
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
        nope_dim, rank = self.config.nope_dim, self.config.kv_lora_rank
        absorbed = q.new_empty(*q.shape[:2], self.config.latent_width)
        absorbed[..., rank:] = q[..., nope_dim:]
        self.kernels.linear_heads(q[..., :nope_dim], up.absorbing, absorbed[..., :rank])
        return absorbed

    def _values(self, attended: Tensor, up: UpProjection) -> Tensor:  # [tokens, heads, value_dim]
        out = attended.new_empty(*attended.shape[:2], self.config.value_dim)
        self.kernels.linear_heads(attended, up.values, out)
        return out

    def _absorbed(self, q: Tensor, latents: Tensor, up: UpProjection, span: Span) -> Tensor:
        keys = latents[:, None]  # one head
        values = keys[..., : self.config.kv_lora_rank]
        scale = self.config.score_scale
        queries = self._absorb(q, up)
        attended = self.kernels.attend_chunk(queries, keys, values, span.start, scale)
        if attended is None:
            attended = attend_span(queries, keys, values, span, scale)
        return self._values(attended, up)

    def _expanded(self, q: Tensor, latents: Tensor, up: UpProjection, span: Span) -> Tensor:
        config, context = self.config, len(latents)
        latent, turned = latents[:, : config.kv_lora_rank], latents[:, config.kv_lora_rank :]
        expanded = self.kernels.linear(latent, up.keys_values).view(context, config.num_heads, -1)
        nope, values = expanded[..., : config.nope_dim], expanded[..., config.nope_dim :]
        scale = config.score_scale
        attended = self.kernels.attend_chunk(q, nope, values, span.start, scale, shared_keys=turned)
        if attended is None:
            keys = torch.cat([nope, turned[:, None].expand(-1, config.num_heads, -1)], dim=-1)
            attended = attend_span(q, keys, values, span, scale)
        return attended
