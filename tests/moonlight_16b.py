"""Checkpoints of Moonlight-16B-A3B's own configuration, with random weights and fewer layers."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.moonlight_files import BOS, EOS, VOCAB_SIZE, write_tiktoken

# As published, but for what only says how the model was trained.
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": VOCAB_SIZE,
}

_SHARD_BYTES = 600 << 20


def write(directory: Path, num_layers: int) -> int:
    """Writes a whole model directory, the weights in shards; returns how many bytes of weights it has.

    No more than one shard is ever in memory.
    """
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": num_layers}, indent=1))
    write_tiktoken(directory)
    index: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(_shards(_tensors(num_layers)), start=1):
        file = f"model-{number:05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    document = {"metadata": {"total_size": total_bytes}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document))
    return total_bytes


def _shards(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        shard[name] = tensor
        if sum(held.nbytes for held in shard.values()) >= _SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _tensors(num_layers: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in _shapes(num_layers):
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        elif name.endswith("e_score_correction_bias"):
            yield name, torch.empty(shape).normal_(std=0.1, generator=generator)
        else:
            bound = _deviation(name, shape[-1]) * math.sqrt(3)
            yield name, torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def _deviation(name: str, fan_in: int) -> float:
    """Such that activations keep their size, and logits stay below 2: above 4, bfloat16 has steps of 0.03."""
    if name == "model.embed_tokens.weight":
        return 1.0
    return (0.3 if name == "lm_head.weight" else 1.0) * fan_in**-0.5


def _shapes(num_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = CONFIG["hidden_size"]
    yield "model.embed_tokens.weight", (VOCAB_SIZE, hidden)
    for layer in range(num_layers):
        is_dense = layer < CONFIG["first_k_dense_replace"]
        for name, shape in [*_attention(), *(_mlp("mlp", CONFIG["intermediate_size"]) if is_dense else _experts())]:
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCAB_SIZE, hidden)


def _attention() -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, rank = CONFIG["hidden_size"], CONFIG["num_attention_heads"], CONFIG["kv_lora_rank"]
    nope, rope, value = CONFIG["qk_nope_head_dim"], CONFIG["qk_rope_head_dim"], CONFIG["v_head_dim"]
    yield "input_layernorm.weight", (hidden,)
    yield "self_attn.q_proj.weight", (heads * (nope + rope), hidden)
    yield "self_attn.kv_a_proj_with_mqa.weight", (rank + rope, hidden)
    yield "self_attn.kv_a_layernorm.weight", (rank,)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + value), rank)
    yield "self_attn.o_proj.weight", (hidden, heads * value)
    yield "post_attention_layernorm.weight", (hidden,)


def _experts() -> Iterator[tuple[str, tuple[int, ...]]]:
    width, experts = CONFIG["moe_intermediate_size"], CONFIG["n_routed_experts"]
    yield "mlp.gate.weight", (experts, CONFIG["hidden_size"])
    yield "mlp.gate.e_score_correction_bias", (experts,)
    for expert in range(experts):
        yield from _mlp(f"mlp.experts.{expert}", width)
    yield from _mlp("mlp.shared_experts", CONFIG["n_shared_experts"] * width)


def _mlp(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = CONFIG["hidden_size"]
    yield f"{name}.gate_proj.weight", (width, hidden)
    yield f"{name}.up_proj.weight", (width, hidden)
    yield f"{name}.down_proj.weight", (hidden, width)
