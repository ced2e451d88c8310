"""Moonlight's architecture against transformers' implementation of it, in float32."""

from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "moonlight": {},
    "query-latent": {"q_lora_rank": 48},
    "groups": {"n_group": 4, "topk_group": 2},
    "unnormalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
    "all-dense": {"first_k_dense_replace": 3},
    "no-dense": {"first_k_dense_replace": 0, "n_shared_experts": 1},
    "plain-rope": {"rope_interleave": False},
    "tied": {"tie_word_embeddings": True},
    "wide-values": {"v_head_dim": 80, "qk_nope_head_dim": 48},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "rope_theta": 50000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "beta_fast": 32,
            "beta_slow": 1,
        }
    },
}
