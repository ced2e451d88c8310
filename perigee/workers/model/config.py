"""What a checkpoint's config.json says of its architecture."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perigee.kvstore.blocks import DType, PayloadLayout
from perigee.workers.model.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. `factor` and the rest are Llama 3's frequency scaling, or the linear one."""

    theta: float
    kind: str = "default"  # default, linear or llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def inverse_frequencies(self, dim: int) -> list[float]:
        """`dim` / 2 frequencies in radians a position, scaled as the checkpoint was trained."""
        plain = [self.theta ** (-2 * i / dim) for i in range(dim // 2)]
        if self.kind == "linear":
            return [frequency / self.factor for frequency in plain]
        if self.kind == "llama3":
            return [self._llama3(frequency) for frequency in plain]
        return plain

    def _llama3(self, frequency: float) -> float:
        """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""
        wavelength = 2 * math.pi / frequency
        if wavelength < self.original_max_position / self.high_freq_factor:
            return frequency
        if wavelength > self.original_max_position / self.low_freq_factor:
            return frequency / self.factor
        turns = self.original_max_position / wavelength
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - smooth) * frequency / self.factor + smooth * frequency


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

    def payload_layout(self, dtype: DType, block_tokens: int) -> PayloadLayout:
        """A block of this model: rotated keys, then values, of every layer."""
        return PayloadLayout(self.num_layers, 2, self.num_kv_heads * self.head_dim, dtype, block_tokens)

    @property
    def num_step_weights(self) -> int:
        """Weights that one step reads: all matrices, the output head among them, but not the embedding's other rows."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        layer = heads * self.hidden_size + 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    def prefill_flops(self, num_tokens: int) -> float:
        """Operations of a prompt: a product and a sum per weight and token, the head once, and causal attention."""
        head = self.vocab_size * self.hidden_size
        matrices = 2 * num_tokens * (self.num_step_weights - head) + 2 * head
        return matrices + 2 * self.num_layers * self.num_heads * self.head_dim * num_tokens**2

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Raises UnsupportedModel for what this model does not do, naming the key."""
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"config.json: hidden_act: {config['hidden_act']!r} is not supported, only 'silu'")
        heads = _positive(config, "num_attention_heads")
        hidden = _positive(config, "hidden_size")
        return cls(
            vocab_size=_positive(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive(config, "intermediate_size"),
            num_layers=_positive(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(config),
            max_context=_positive(config, "max_position_embeddings"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )


ModelConfig = LlamaConfig


def load_config(directory: Path) -> ModelConfig:
    """The architecture of the checkpoint in `directory`. Raises UnsupportedModel for one that is not served."""
    config = json.loads((directory / "config.json").read_text())
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "of unknown method")
        raise UnsupportedModel(f"config.json: quantization_config: {method} weights are not supported")
    model_type = config.get("model_type")
    if model_type != "llama":
        raise UnsupportedModel(f"config.json: model_type: {model_type!r} is not supported, only 'llama'")
    return LlamaConfig.from_json(config)


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise UnsupportedModel(f"config.json: {key}: {value!r} is not a positive integer")
    return value


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    """Both spellings: `rope_theta` with `rope_scaling`, and the newer `rope_parameters`."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedModel(f"config.json: rope_type: {kind!r} is not supported, only default, linear and llama3")
    return RopeConfig(
        theta=float(scaling.get("rope_theta", config.get("rope_theta", 10000.0))),
        kind=kind,
        factor=float(scaling.get("factor", 1.0)),
        low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
        high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
        original_max_position=int(scaling.get("original_max_position_embeddings", 8192)),
    )
