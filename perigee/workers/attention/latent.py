"""Attention over cached latents (DeepSeek-V2, 2.1): absorbed where queries are few, expanded where they are many.

A head's key is [U_k c, r] and its value U_v c, of the cached latent c and rotated key r. So its score is

    ⟨q, k⟩ = ⟨q_nope, U_k c⟩ + ⟨q_rope, r⟩ = ⟨[U_kᵀ q_nope, q_rope], [c, r]⟩,

and the weighted sum of its values is U_v applied to that of the latents. *Absorbed*, all heads attend to the one cached
row, and nothing is computed of a cached token but its scores. *Expanded*, every head's keys and values are computed
first, and each score then costs a third.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from perigee.workers.attention.base import LayerCache, Span, StepBatch
from perigee.workers.attention.chunks import ChunkAttention, with_shared
from perigee.workers.attention.decode import attend_decode, is_sparse
from perigee.workers.kernels.base import Kernels, Matrix
from perigee.workers.model.layers import Prepared
from perigee.workers.model.moba_config import MobaConfig
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


class LatentBackend(Protocol):
    """Causal attention over latents."""

    def attend(self, q: Tensor, cache: LayerCache, up: UpProjection, batch: StepBatch) -> Tensor:
        """As `Attention.attend`: q is [tokens, heads, nope_dim + rope_dim], rotated; what is cached of a token are its
        latent and its rotated key, [rank + rope_dim]."""
        ...


class LatentAttention:
    """See `LatentBackend`. On any device."""

    def __init__(self, config: MoonlightConfig, kernels: Kernels, moba: MobaConfig | None) -> None:
        self.config = config
        self.kernels = kernels
        self.chunks = ChunkAttention(config.score_scale, kernels, moba)

    def attend(self, q: Tensor, cache: LayerCache, up: UpProjection, batch: StepBatch) -> Tensor:
        """See `LatentBackend`."""
        cache.summarise(batch.full_pages)
        if batch.decode:
            latents = cache.keys[:, : self.config.kv_lora_rank]
            attended = attend_decode(self._absorb(q, up), cache, latents, batch, batch.decode, self.chunks)
            if attended is not None:
                return self._values(attended, up)
        if len(batch.spans) == 1:
            return self._attend_span(q, cache, up, batch.spans[0])
        out = q.new_empty(*q.shape[:2], self.config.value_dim)
        for span in batch.spans:
            own = slice(span.first, span.first + span.length)
            out[own] = self._attend_span(q[own], cache, up, span)
        return out

    def _attend_span(self, q: Tensor, cache: LayerCache, up: UpProjection, span: Span) -> Tensor:
        attend = self._absorbed if self.absorbs(span) else self._expanded
        return attend(q, cache, up, span)

    def absorbs(self, span: Span) -> bool:
        """Whether the absorbed form takes fewer operations for this part of a step, a head."""
        config, moba = self.config, self.chunks.moba
        length, context = span.length, span.context
        rank, head_dims = config.kv_lora_rank, config.nope_dim + config.value_dim
        seen = context - (length - 1) / 2
        if moba and is_sparse(span, moba):
            seen = min(seen, moba.block_size * (moba.top_k - 0.5))
        absorbed = length * rank * head_dims + length * seen * (2 * rank + config.rope_dim)
        expanded = context * rank * head_dims + length * seen * (head_dims + config.rope_dim)
        return absorbed < expanded

    def _absorb(self, q: Tensor, up: UpProjection) -> Tensor:  # [tokens, heads, rank + rope_dim]
        return self.kernels.linear_heads(q, up.absorbing)

    def _values(self, attended: Tensor, up: UpProjection) -> Tensor:  # [tokens, heads, value_dim]
        return self.kernels.linear_heads(attended, up.values)

    def _absorbed(self, q: Tensor, cache: LayerCache, up: UpProjection, span: Span) -> Tensor:
        keys = cache.keys[span.pool_rows][:, None]  # one head
        values = keys[..., : self.config.kv_lora_rank]
        queries = self._absorb(q, up)
        attended = self.chunks.attend(queries, keys, values, span, lambda: self._centroids(cache, span)[:, None])
        return self._values(attended, up)

    def _expanded(self, q: Tensor, cache: LayerCache, up: UpProjection, span: Span) -> Tensor:
        nope, values, turned = self._expand(cache.keys[span.pool_rows], up)

        def centroids() -> Tensor:
            blocks = self._centroids(cache, span)
            # What blocks have in common ranks none of them, and would be all that bfloat16 has room for.
            distinct = blocks if q.dtype == torch.float32 else blocks - blocks[:1]
            own, _, shared = self._expand(distinct.to(q.dtype), up)
            return with_shared(own, shared)

        return self.chunks.attend(q, nope, values, span, centroids, shared_keys=turned)

    def _expand(self, cached: Tensor, up: UpProjection) -> tuple[Tensor, Tensor, Tensor]:
        """Each head's own part of the keys and its values, [rows, heads, ...], and what the keys share, [rows, rest].

        cached: [rows, rank + rope_dim].
        """
        rank, nope_dim = self.config.kv_lora_rank, self.config.nope_dim
        expanded = self.kernels.linear(cached[:, :rank], up.keys_values).view(
            len(cached), up.heads, nope_dim + self.config.value_dim
        )
        return expanded[..., :nope_dim], expanded[..., nope_dim:], cached[:, rank:]

    def _centroids(self, cache: LayerCache, span: Span) -> Tensor:
        assert self.chunks.moba
        return cache.block_centroids(span, self.chunks.moba.block_size)
