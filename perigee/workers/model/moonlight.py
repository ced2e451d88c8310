"""Moonlight, and other models of DeepSeek-V3's architecture: latent attention and a mixture of experts."""

from collections.abc import Iterator

from perigee.workers.attention.latent import LatentAttention
from perigee.workers.kernels.base import Kernels
from perigee.workers.model.decoder import Decoder, DecoderLayer, sparse_layer
from perigee.workers.model.layers import GatedMLP, Place, RotaryTable
from perigee.workers.model.mla import MultiHeadLatentAttention
from perigee.workers.model.moe import MixtureOfExperts
from perigee.workers.model.moonlight_config import MoonlightConfig


class Moonlight(Decoder):
    """See `Decoder`. Weights for predicting further tokens, which some checkpoints have, are left out."""

    def __init__(self, config: MoonlightConfig, kernels: Kernels) -> None:
        def layer(index: int) -> DecoderLayer:
            backend = LatentAttention(config, kernels, sparse_layer(config, index))
            attention = MultiHeadLatentAttention(config, backend, kernels)
            dense = index < config.num_dense_layers
            mlp = (
                GatedMLP(config.hidden_size, config.intermediate_size, kernels)
                if dense
                else MixtureOfExperts(config, kernels)
            )
            return DecoderLayer(config.hidden_size, config.rms_norm_eps, attention, mlp, kernels)

        rotary = RotaryTable(config.rope, config.rope_dim, config.max_context, interleaved=config.interleaved_rope)
        super().__init__(config, (layer(index) for index in range(config.num_layers)), rotary, kernels)

    def layer_places(self, prefix: str, layer: DecoderLayer) -> Iterator[tuple[str, Place]]:
        assert isinstance(layer.attention, MultiHeadLatentAttention)
        assert isinstance(layer.mlp, GatedMLP | MixtureOfExperts)
        yield from layer.attention.places(f"{prefix}.self_attn")
        yield from layer.mlp.places(f"{prefix}.mlp")
