"""Seeded random models of Moonlight's architecture, small enough for tests, as transformers writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)

BASE: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.446,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "rope_theta": 50000.0,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def write(directory: Path, version: int = 3, dtype: str = "float32", head_scale: float = 4, **changes: Any) -> Path:
    """Writes config.json and sharded safetensors of `BASE` with `changes`; returns `directory`.

    `head_scale` is about how far logits are from their mean: the farther, the clearer is which token is likeliest.
    """
    torch.manual_seed(0)
    model = _model(version, changes)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        _initialise(name, tensor, head_scale)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="1MB")
    # Keys that published configurations carry, but transformers leaves out.
    published = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"} if version == 3 else {}
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | published | changes, indent=1))
    return directory


def _model(version: int, changes: dict[str, Any]) -> PreTrainedModel:
    if version == 2:
        return DeepseekV2ForCausalLM(DeepseekV2Config(**BASE | changes))
    return DeepseekV3ForCausalLM(DeepseekV3Config(**BASE | changes))


@torch.no_grad()
def _initialise(name: str, tensor: torch.Tensor, head_scale: float) -> None:
    """Weights scaled by fan-in, so that activations keep their size and the logits are far from flat."""
    if name.endswith("e_score_correction_bias"):
        tensor.normal_(std=0.2)
    elif name.endswith("lm_head.weight"):
        tensor.normal_(std=head_scale * tensor.shape[-1] ** -0.5)
    elif "norm" in name:
        tensor.uniform_(0.5, 1.5)
    elif "embed" in name:
        tensor.normal_()
    elif tensor.dim() > 1:
        tensor.normal_(std=tensor.shape[-1] ** -0.5)
