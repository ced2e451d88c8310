"""Llama-family models: grouped-query attention and a gated MLP.

Query, key and value projections are one matrix, gate and up another: on a CPU the number of calls counts, not only
bytes.
"""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from perigee.kvstore.blocks import DType
from perigee.workers.attention.base import TORCH_DTYPES, Attention, KVPool, StepBatch
from perigee.workers.attention.dense import DenseAttention
from perigee.workers.model.config import LlamaConfig
from perigee.workers.model.layers import RotaryTable, rotate


class LlamaAttention(nn.Module):
    """Projects, rotates, writes keys and values to the pool, attends."""

    def __init__(self, config: LlamaConfig, backend: Attention) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.attention_bias)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], layer: tuple[Tensor, ...], batch: StepBatch
    ) -> Tensor:  # [tokens, hidden]
        config, tokens = self.config, len(x)
        keys, values = layer
        qk_heads = config.num_heads + config.num_kv_heads
        qkv = self.qkv(x).view(tokens, qk_heads + config.num_kv_heads, config.head_dim)
        qk = rotate(qkv[:, :qk_heads], *rope)
        q, k, v = qk[:, : config.num_heads], qk[:, config.num_heads :], qkv[:, qk_heads:]
        keys.index_copy_(0, batch.rows, k.reshape(tokens, -1))
        values.index_copy_(0, batch.rows, v.reshape(tokens, -1))
        return self.out(self.backend.attend(q, keys, values, batch).reshape(tokens, -1))  # type: ignore[no-any-return]


class LlamaMLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # [tokens, hidden]
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class LlamaLayer(nn.Module):
    def __init__(self, config: LlamaConfig, backend: Attention) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = LlamaAttention(config, backend)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], layer: tuple[Tensor, ...], batch: StepBatch
    ) -> Tensor:  # [tokens, hidden]
        x = x + self.attention(self.attention_norm(x), rope, layer, batch)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """The whole model. Its parameters are empty until `load_weights` fills them."""

    def __init__(self, config: LlamaConfig, dtype: DType) -> None:
        super().__init__()
        self.config = config
        backend = DenseAttention(config.num_kv_heads, config.head_dim)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, backend) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryTable(config.rope, config.head_dim, config.max_context, TORCH_DTYPES[dtype])

    def forward(self, token_ids: Tensor, batch: StepBatch, pool: KVPool) -> Tensor:
        """The hidden states [tokens, hidden] of `token_ids` [tokens]; their keys and values are in the pool then."""
        x = self.embedding(token_ids)
        rope = self.rotary.at(batch.positions)
        for layer, cache in zip(self.layers, pool.layers, strict=True):
            x = layer(x, rope, cache, batch)
        return x  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocabulary] for hidden states [rows, hidden]."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(self.norm(hidden), weight)

    def checkpoint_parts(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of a Hugging Face checkpoint, and the place in this model where it belongs."""
        yield "model.embed_tokens.weight", self.embedding.weight
        yield "model.norm.weight", self.norm.weight
        if self.head is not None:
            yield "lm_head.weight", self.head.weight
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, LlamaLayer)
            yield from self._layer_parts(f"model.layers.{index}", layer)

    def _layer_parts(self, prefix: str, layer: LlamaLayer) -> Iterator[tuple[str, Tensor]]:
        config = self.config
        yield f"{prefix}.input_layernorm.weight", layer.attention_norm.weight
        yield f"{prefix}.post_attention_layernorm.weight", layer.mlp_norm.weight
        kv_width = config.num_kv_heads * config.head_dim
        qkv_sizes = (config.num_heads * config.head_dim, kv_width, kv_width)
        yield from _linear_parts(prefix, ("q_proj", "k_proj", "v_proj"), "self_attn", layer.attention.qkv, qkv_sizes)
        yield from _linear_parts(prefix, ("o_proj",), "self_attn", layer.attention.out, (config.hidden_size,))
        mlp_sizes = (config.intermediate_size,) * 2
        yield from _linear_parts(prefix, ("gate_proj", "up_proj"), "mlp", layer.mlp.gate_up, mlp_sizes)
        yield from _linear_parts(prefix, ("down_proj",), "mlp", layer.mlp.down, (config.hidden_size,))


def _linear_parts(
    prefix: str, names: tuple[str, ...], module: str, linear: nn.Linear, sizes: tuple[int, ...]
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors whose rows are stacked in `linear`."""
    for kind, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        if tensor is not None:
            first = 0
            for name, size in zip(names, sizes, strict=True):
                yield f"{prefix}.{module}.{name}.{kind}", tensor[first : first + size]
                first += size
