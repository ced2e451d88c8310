"""What a configuration of Moonlight's architecture comes to, and what is refused by the key that asks for it."""

import json
from pathlib import Path
from typing import Any

import pytest

from perigee.workers.model.config import load_config
from perigee.workers.model.errors import UnsupportedModel
from perigee.workers.model.moonlight_config import MoonlightConfig
from tests.moonlight_16b import CONFIG


def test_the_cache_holds_the_latent_and_the_rotated_key_alone() -> None:
    config = MoonlightConfig.from_json(CONFIG)
    layout = config.payload_layout("bfloat16", block_tokens=32)
    assert layout.tensor_bytes == 27 * 32 * 2 * (512 + 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias: True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: 2"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"topk_method": "random"}, "topk_method: 'random'"),
        ({"scoring_func": "relu"}, "scoring_func: 'relu'"),
        ({"n_group": 5}, "n_group: 5 does not divide 64"),
        ({"n_group": 8, "topk_group": 9}, "topk_group: 9 of 8"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok: 65 of 64"),
        ({"n_group": 32, "topk_group": 2}, "num_experts_per_tok: 6 of 4"),
        ({"topk_method": "greedy"}, "norm_topk_prob: true is not supported with 'greedy' and a scale"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate: False"),
        ({"kv_lora_rank": None}, "kv_lora_rank: None is not a positive integer"),
        ({"q_lora_rank": 0}, "q_lora_rank: 0 is not a positive integer"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: fp8 weights"),
        ({"model_type": "deepseek_v4"}, "model_type: 'deepseek_v4'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_by_its_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(UnsupportedModel) as raised:
        load_config(tmp_path)
    assert message in str(raised.value)


def test_yarn_without_the_length_of_training_means_the_context() -> None:
    scaled = MoonlightConfig.from_json(CONFIG | {"rope_scaling": {"type": "yarn", "factor": 2.0}})
    assert scaled.rope.original_max_position == CONFIG["max_position_embeddings"]
