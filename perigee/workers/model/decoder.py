"""What all decoder-only models here share: a residual stream through layers of attention and MLP."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from perigee.workers.attention.base import KVPool, LayerCache, StepBatch
from perigee.workers.kernels.base import Kernels, Matrix, Rope
from perigee.workers.model.config import ModelConfig
from perigee.workers.model.layers import Place, Prepared, RotaryTable
from perigee.workers.model.moba_config import MobaConfig


class DecoderLayer(nn.Module):
    """Takes the residual stream and what the layer before would add to it, so that sum and norm are one operation."""

    def __init__(self, width: int, eps: float, attention: nn.Module, mlp: nn.Module, kernels: Kernels) -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels
        self.attention_norm = nn.Parameter(torch.empty(width))
        self.attention = attention
        self.mlp_norm = nn.Parameter(torch.empty(width))
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        rope: Rope,
        cache: LayerCache,
        batch: StepBatch,
    ) -> tuple[Tensor, Tensor]:  # residual and delta, each [tokens, width]
        x, normed = self.kernels.add_rms_norm(x, delta, self.attention_norm, self.eps)
        delta = self.attention(normed, rope, cache, batch)
        x, normed = self.kernels.add_rms_norm(x, delta, self.mlp_norm, self.eps)
        return x, self.mlp(normed)


class Decoder(Prepared):
    """The whole model. Its parameters are empty until `load_model` fills them."""

    def __init__(
        self, config: ModelConfig, layers: Iterator[DecoderLayer], rotary: RotaryTable, kernels: Kernels
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nn.Parameter(torch.empty(shape))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        self.head = None if config.tie_word_embeddings else nn.Parameter(torch.empty(shape))
        self.head_matrix = Matrix(self.embedding if self.head is None else self.head)
        self.rotary = rotary

    def prepare(self) -> None:
        (self.head_matrix,) = self.kernels.matrices(self.head_matrix.tensor)

    def forward(self, token_ids: Tensor, batch: StepBatch, pool: KVPool) -> Tensor:
        """The hidden states [tokens, width] of `token_ids` [tokens]; what they cache is in the pool then."""
        x, rope = self.embed(token_ids, batch.positions)
        residual, delta = self.run_layers(x, rope, batch, pool)
        return residual + delta

    def embed(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, Rope]:
        """What the first layer takes: the tokens' rows [tokens, width], and what rotates them."""
        tied = self.head is None
        x = self.kernels.rows(self.head_matrix if tied else Matrix(self.embedding), token_ids)
        return x, self.rotary.at(positions)

    def run_layers(self, x: Tensor, rope: Rope, batch: StepBatch, pool: KVPool) -> tuple[Tensor, Tensor]:
        """The residual stream [tokens, width] before the last layer's MLP, and what that adds to it."""
        delta: Tensor | None = None
        for layer, cache in zip(self.layers, pool.layers, strict=True):
            x, delta = layer(x, delta, rope, cache, batch)
        assert delta is not None  # a model has layers
        return x, delta

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocabulary], float32, for hidden states [rows, width]."""
        _, normed = self.kernels.add_rms_norm(hidden, None, self.norm, self.config.rms_norm_eps)
        return self.kernels.logits(normed, self.head_matrix)

    def places(self) -> Iterator[tuple[str, Place]]:
        """Each tensor of a Hugging Face checkpoint, and the place in this model where it belongs."""
        yield "model.embed_tokens.weight", Place.of(self.embedding)
        yield "model.norm.weight", Place.of(self.norm)
        if self.head is not None:
            yield "lm_head.weight", Place.of(self.head)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            prefix = f"model.layers.{index}"
            yield f"{prefix}.input_layernorm.weight", Place.of(layer.attention_norm)
            yield f"{prefix}.post_attention_layernorm.weight", Place.of(layer.mlp_norm)
            yield from self.layer_places(prefix, layer)

    @abstractmethod
    def layer_places(self, prefix: str, layer: DecoderLayer) -> Iterator[tuple[str, Place]]:
        """The same for what is in `layer` beside its norms."""


def sparse_layer(config: ModelConfig, index: int) -> MobaConfig | None:
    """How the layer of this index chooses blocks; None if it attends to everything."""
    moba = config.moba
    return moba if moba and index < config.num_layers - moba.full_layers else None
