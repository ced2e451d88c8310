"""A checkpoint of Moonlight's architecture: random weights, 72 million, but the latent as wide as Moonlight's own."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from perigee.workers.kernels.reference import TorchKernels
from perigee.workers.model.config import load_config
from perigee.workers.model.weights import empty_model

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.446,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 50000.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
_STD = 0.02  # of every matrix, as DeepSeek-V3 is initialised


def write(directory: Path, seed: int = 0) -> Path:
    """Writes config.json and model.safetensors, 144 MB; returns `directory`."""
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=1))
    random = torch.Generator().manual_seed(seed)
    places = empty_model(load_config(directory), "bfloat16", TorchKernels()).places()
    tensors = {name: _weight(place.shape, random) for name, place in places}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _weight(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:  # a norm's scale, or the bias of a router's choice
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=random) * _STD).bfloat16()
