"""What a checkpoint's config.json says of its architecture."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from perigee.kvstore.blocks import DType, PayloadLayout
from perigee.workers.model.errors import UnsupportedModel
from perigee.workers.model.llama_config import LlamaConfig
from perigee.workers.model.moba_config import OFF, MobaConfig
from perigee.workers.model.moonlight_config import MoonlightConfig


class Architecture(Protocol):
    """What everyone but the model itself asks of an architecture."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context(self) -> int: ...

    def payload_layout(self, dtype: DType, block_tokens: int) -> PayloadLayout:
        """What one block of this model's KVCache looks like."""
        ...

    def step_weights(self, num_sequences: int) -> float:
        """Weights that one decode step of so many sequences reads, in expectation, embeddings left out."""
        ...

    def decode_flops(self, context: int) -> float:
        """Operations of one token after `context` others."""
        ...

    def prefill_flops(self, num_tokens: int) -> float:
        """Operations of a prompt without prefix: its attention is causal, and only its last token gets logits."""
        ...


ModelConfig = LlamaConfig | MoonlightConfig

_ARCHITECTURES: Mapping[str, Callable[[Mapping[str, Any]], ModelConfig]] = {
    "llama": LlamaConfig.from_json,
    "deepseek_v3": MoonlightConfig.from_json,
    "deepseek_v2": MoonlightConfig.from_json,
}


def load_config(directory: Path, moba: str = "") -> ModelConfig:
    """The architecture of the checkpoint in `directory`. Raises UnsupportedModel for one that is not served.

    `moba`, if given, replaces what it says of block-sparse attention: "off", or as `MobaConfig.parse` reads it.
    """
    config = json.loads((directory / "config.json").read_text())
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "of unknown method")
        raise UnsupportedModel(f"config.json: quantization_config: {method} weights are not supported")
    model_type = config.get("model_type")
    if model_type not in _ARCHITECTURES:
        allowed = ", ".join(map(repr, _ARCHITECTURES))
        raise UnsupportedModel(f"config.json: model_type: {model_type!r} is not supported, only {allowed}")
    model = _ARCHITECTURES[model_type](config)
    return replace(model, moba=None if moba == OFF else MobaConfig.parse(moba)) if moba else model
