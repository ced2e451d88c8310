"""Llama-family models: grouped-query attention and a gated MLP."""

from collections.abc import Iterator

from torch import Tensor, nn

from perigee.workers.attention.base import Attention, LayerCache, StepBatch
from perigee.workers.attention.grouped import GroupedAttention
from perigee.workers.kernels.base import Kernels, Rope
from perigee.workers.model.decoder import Decoder, DecoderLayer, sparse_layer
from perigee.workers.model.layers import GatedMLP, Place, Projection, RotaryTable
from perigee.workers.model.llama_config import LlamaConfig


class LlamaAttention(nn.Module):
    """Projects, rotates, writes keys and values to the pool, attends. The three projections are one matrix."""

    def __init__(self, config: LlamaConfig, backend: Attention, kernels: Kernels) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.kernels = kernels
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        heads_width = config.num_heads * config.head_dim
        self.qkv = Projection(config.hidden_size, width, kernels, bias=config.attention_bias)
        self.out = Projection(heads_width, config.hidden_size, kernels, bias=config.attention_bias)

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache, batch: StepBatch) -> Tensor:  # [tokens, hidden]
        tokens = len(x)
        assert cache.values is not None
        qkv = self.qkv(x).view(tokens, -1, self.config.head_dim)
        q = self.kernels.rotate_and_store(qkv, rope, batch.rows, cache.keys, cache.values, self.config.num_heads)
        out: Tensor = self.out(self.backend.attend(q, cache, batch).reshape(tokens, -1))
        return out

    def places(self, prefix: str) -> Iterator[tuple[str, Place]]:
        config = self.config
        kv_width = config.num_kv_heads * config.head_dim
        sizes = (config.num_heads * config.head_dim, kv_width, kv_width)
        yield from self.qkv.places(prefix, ("q_proj", "k_proj", "v_proj"), sizes)
        yield from self.out.places(prefix, ("o_proj",), (config.hidden_size,))


class Llama(Decoder):
    """See `Decoder`."""

    def __init__(self, config: LlamaConfig, kernels: Kernels) -> None:
        def layer(index: int) -> DecoderLayer:
            moba = sparse_layer(config, index)
            backend = GroupedAttention(config.num_kv_heads, config.head_dim, kernels, moba)
            attention = LlamaAttention(config, backend, kernels)
            mlp = GatedMLP(config.hidden_size, config.intermediate_size, kernels, bias=config.mlp_bias)
            return DecoderLayer(config.hidden_size, config.rms_norm_eps, attention, mlp, kernels)

        rotary = RotaryTable(config.rope, config.head_dim, config.max_context)
        super().__init__(config, (layer(index) for index in range(config.num_layers)), rotary, kernels)

    def layer_places(self, prefix: str, layer: DecoderLayer) -> Iterator[tuple[str, Place]]:
        assert isinstance(layer.attention, LlamaAttention) and isinstance(layer.mlp, GatedMLP)
        yield from layer.attention.places(f"{prefix}.self_attn")
        yield from layer.mlp.places(f"{prefix}.mlp")
