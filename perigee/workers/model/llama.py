"""Llama-family models: grouped-query attention and a gated MLP.

Query, key and value projections are one matrix, gate and up another: on a CPU the number of calls counts, not only
bytes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perigee.kvstore.blocks import DType
from perigee.workers.attention.base import TORCH_DTYPES, Attention, KVPool, StepBatch
from perigee.workers.attention.dense import DenseAttention
from perigee.workers.kernels.base import Kernels
from perigee.workers.kernels.registry import select
from perigee.workers.model.config import LlamaConfig
from perigee.workers.model.layers import Projection, RotaryTable


class LlamaAttention(nn.Module):
    """Projects, rotates, writes keys and values to the pool, attends."""

    def __init__(self, config: LlamaConfig, backend: Attention, kernels: Kernels) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.kernels = kernels
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        heads_width = config.num_heads * config.head_dim
        self.qkv = Projection(config.hidden_size, width, kernels, bias=config.attention_bias)
        self.out = Projection(heads_width, config.hidden_size, kernels, bias=config.attention_bias)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], layer: tuple[Tensor, ...], batch: StepBatch
    ) -> Tensor:  # [tokens, hidden]
        tokens = len(x)
        keys, values = layer
        qkv = self.qkv(x).view(tokens, -1, self.config.head_dim)
        q = self.kernels.rotate_and_store(qkv, rope, batch.rows, keys, values, self.config.num_heads)
        return self.out(self.backend.attend(q, keys, values, batch).reshape(tokens, -1))  # type: ignore[no-any-return]


class LlamaMLP(nn.Module):
    def __init__(self, config: LlamaConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up = Projection(config.hidden_size, 2 * config.intermediate_size, kernels, bias=config.mlp_bias)
        self.down = Projection(config.intermediate_size, config.hidden_size, kernels, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # [tokens, hidden]
        return self.down(self.kernels.gated_silu(self.gate_up(x)))  # type: ignore[no-any-return]


class LlamaLayer(nn.Module):
    """Takes the residual stream and what the layer before would add to it, so that sum and norm are one operation."""

    def __init__(self, config: LlamaConfig, backend: Attention, kernels: Kernels) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.kernels = kernels
        self.attention_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.attention = LlamaAttention(config, backend, kernels)
        self.mlp_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.mlp = LlamaMLP(config, kernels)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        rope: tuple[Tensor, Tensor],
        layer: tuple[Tensor, ...],
        batch: StepBatch,
    ) -> tuple[Tensor, Tensor]:  # residual and delta, each [tokens, hidden]
        x, normed = self.kernels.add_rms_norm(x, delta, self.attention_norm, self.eps)
        delta = self.attention(normed, rope, layer, batch)
        x, normed = self.kernels.add_rms_norm(x, delta, self.mlp_norm, self.eps)
        return x, self.mlp(normed)


class Llama(nn.Module):
    """The whole model. Its parameters are empty until `load_model` fills them."""

    def __init__(self, config: LlamaConfig, dtype: DType) -> None:
        super().__init__()
        self.config = config
        self.kernels = select(dtype)
        backend = DenseAttention(config.num_kv_heads, config.head_dim, self.kernels)
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(LlamaLayer(config, backend, self.kernels) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        tied = config.tie_word_embeddings
        self.head = None if tied else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.rotary = RotaryTable(config.rope, config.head_dim, config.max_context, TORCH_DTYPES[dtype])

    def forward(self, token_ids: Tensor, batch: StepBatch, pool: KVPool) -> Tensor:
        """The hidden states [tokens, hidden] of `token_ids` [tokens]; their keys and values are in the pool then."""
        x = F.embedding(token_ids, self.embedding)
        delta: Tensor | None = None
        rope = self.rotary.at(batch.positions)
        for layer, cache in zip(self.layers, pool.layers, strict=True):
            x, delta = layer(x, delta, rope, cache, batch)
        return x if delta is None else x + delta

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocabulary] for hidden states [rows, hidden]."""
        _, normed = self.kernels.add_rms_norm(hidden, None, self.norm, self.config.rms_norm_eps)
        return self.kernels.linear(normed, self.embedding if self.head is None else self.head)

    def checkpoint_parts(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of a Hugging Face checkpoint, and the place in this model where it belongs."""
        yield "model.embed_tokens.weight", self.embedding
        yield "model.norm.weight", self.norm
        if self.head is not None:
            yield "lm_head.weight", self.head
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, LlamaLayer)
            yield from self._layer_parts(f"model.layers.{index}", layer)

    def _layer_parts(self, prefix: str, layer: LlamaLayer) -> Iterator[tuple[str, Tensor]]:
        config = self.config
        yield f"{prefix}.input_layernorm.weight", layer.attention_norm
        yield f"{prefix}.post_attention_layernorm.weight", layer.mlp_norm
        kv_width = config.num_kv_heads * config.head_dim
        qkv_sizes = (config.num_heads * config.head_dim, kv_width, kv_width)
        yield from _linear_parts(prefix, ("q_proj", "k_proj", "v_proj"), "self_attn", layer.attention.qkv, qkv_sizes)
        yield from _linear_parts(prefix, ("o_proj",), "self_attn", layer.attention.out, (config.hidden_size,))
        mlp_sizes = (config.intermediate_size,) * 2
        yield from _linear_parts(prefix, ("gate_proj", "up_proj"), "mlp", layer.mlp.gate_up, mlp_sizes)
        yield from _linear_parts(prefix, ("down_proj",), "mlp", layer.mlp.down, (config.hidden_size,))


def _linear_parts(
    prefix: str, names: tuple[str, ...], module: str, linear: Projection, sizes: tuple[int, ...]
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors whose rows are stacked in `linear`."""
    for kind, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        if tensor is not None:
            first = 0
            for name, size in zip(names, sizes, strict=True):
                yield f"{prefix}.{module}.{name}.{kind}", tensor[first : first + size]
                first += size
