"""The Llama family's architecture."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perigee.kvstore.blocks import DType, PayloadLayout
from perigee.workers.model.config_fields import one_of, positive
from perigee.workers.model.moba_config import MobaConfig
from perigee.workers.model.rope import RopeConfig


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """A Llama-family model. Sizes are in elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_context: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    moba: MobaConfig | None

    def payload_layout(self, dtype: DType, block_tokens: int) -> PayloadLayout:
        """A block of this model: rotated keys, then values, of every layer."""
        return PayloadLayout(self.num_layers, 2, self.num_kv_heads * self.head_dim, dtype, block_tokens)

    def step_weights(self, num_sequences: int) -> float:
        """All matrices, the output head among them, but not the embedding's other rows."""
        return self._layer_weights * self.num_layers + self._head_weights

    def decode_flops(self, context: int) -> float:
        """A product and a sum per weight, and attention."""
        attention = 4 * self.num_layers * self.num_heads * self.head_dim * context
        return 2 * self.step_weights(1) + attention

    def prefill_flops(self, num_tokens: int) -> float:
        """A product and a sum per weight and token, the head once, and causal attention."""
        matrices = 2 * num_tokens * self._layer_weights * self.num_layers + 2 * self._head_weights
        return matrices + 2 * self.num_layers * self.num_heads * self.head_dim * num_tokens**2

    @property
    def _layer_weights(self) -> int:
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return heads * self.hidden_size + 3 * self.hidden_size * self.intermediate_size

    @property
    def _head_weights(self) -> int:
        return self.vocab_size * self.hidden_size

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Raises UnsupportedModel for what this model does not do, naming the key."""
        one_of(config, "hidden_act", ("silu",))
        heads = positive(config, "num_attention_heads")
        hidden = positive(config, "hidden_size")
        return cls(
            vocab_size=positive(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=positive(config, "intermediate_size"),
            num_layers=positive(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_json(config),
            max_context=positive(config, "max_position_embeddings"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            moba=MobaConfig.from_json(config["moba"]) if config.get("moba") else None,
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )
