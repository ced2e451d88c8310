"""Multi-head latent attention (DeepSeek-V2, 2.1): keys and values of all heads are projections of one cached latent."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from perigee.workers.attention.base import LayerCache, StepBatch
from perigee.workers.attention.latent import LatentBackend, UpProjection
from perigee.workers.kernels.base import Kernels, Rope
from perigee.workers.model.layers import Place, Projection
from perigee.workers.model.moonlight_config import MoonlightConfig

# Of the norms within attention, whatever config.json says of the others: so it is in DeepSeek's published code.
LATENT_NORM_EPS = 1e-6


class MultiHeadLatentAttention(nn.Module):
    """Projects, normalises the latent, rotates, writes latent and rotated key to the pool, attends."""

    def __init__(self, config: MoonlightConfig, backend: LatentBackend, kernels: Kernels) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.kernels = kernels
        query_dim = config.num_heads * (config.nope_dim + config.rope_dim)
        # All that reads the layer's input is one matrix: queries, or the latent they come from, and that of the keys.
        self.from_input = config.q_lora_rank or query_dim
        self.inputs = Projection(config.hidden_size, self.from_input + config.latent_width, kernels)
        self.latent_norm = nn.Parameter(torch.empty(config.kv_lora_rank))
        self.query_norm, self.query = None, None
        if config.q_lora_rank:
            self.query_norm = nn.Parameter(torch.empty(config.q_lora_rank))
            self.query = Projection(config.q_lora_rank, query_dim, kernels)
        self.up = UpProjection(config, kernels)
        self.out = Projection(config.num_heads * config.value_dim, config.hidden_size, kernels)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache, batch: StepBatch) -> Tensor:  # [tokens, hidden]
        config, tokens = self.config, len(x)
        queries, latent = self.inputs(x).split([self.from_input, config.latent_width], dim=-1)
        if self.query is not None and self.query_norm is not None:
            queries = self.query(self.kernels.add_rms_norm(queries, None, self.query_norm, LATENT_NORM_EPS)[1])
        q = queries.view(tokens, config.num_heads, -1)
        q = self.kernels.rotate_and_store_latent(
            q, latent, self.latent_norm, LATENT_NORM_EPS, rope, batch.rows, cache.keys
        )
        out: Tensor = self.out(self.backend.attend(q, cache, self.up, batch).reshape(tokens, -1))
        return out

    def places(self, prefix: str) -> Iterator[tuple[str, Place]]:
        config = self.config
        first = "q_a_proj" if config.q_lora_rank else "q_proj"
        sizes = (self.from_input, config.latent_width)
        yield from self.inputs.places(prefix, (first, "kv_a_proj_with_mqa"), sizes)
        yield f"{prefix}.kv_a_layernorm.weight", Place.of(self.latent_norm)
        if self.query is not None and self.query_norm is not None:
            yield f"{prefix}.q_a_layernorm.weight", Place.of(self.query_norm)
            yield from self.query.places(prefix, ("q_b_proj",), (len(self.query.weight),))
        yield f"{prefix}.kv_b_proj.weight", Place(self.up.weight, (self.up.weight[..., 0].numel(), config.kv_lora_rank))
        yield from self.out.places(prefix, ("o_proj",), (config.hidden_size,))
