"""What a step of a model reads and computes, from its configuration: the half of a roofline that the model says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perigee.scheduler.errors import InvalidProfile

_BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes are in elements, operations are floating-point operations, all summed over the layers.

    `shared_weights` are those that each token of a step meets: attention, dense layers, shared experts, routers.
    `expert_weights` are all routed experts, of which a token meets `experts_per_token` of `num_experts` in each layer.
    `head_weights` are read once a step and computed for sampled tokens only.
    """

    num_layers: int
    hidden_size: int
    shared_weights: int
    head_weights: int
    pair_flops: int  # attention of one prompt token to one token before it
    context_flops: int  # attention of one decoded token to one token before it
    kv_bytes_per_token: int
    kv_heads: int  # by which a tensor-parallel group can split the KVCache
    expert_weights: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    weight_bytes: int = _BF16_BYTES  # of one element of weights and activations

    @property
    def expert_share(self) -> float:
        """The chance that a token meets a given routed expert."""
        return self.experts_per_token / self.num_experts if self.num_experts else 0.0

    @property
    def active_weights(self) -> float:
        """Those of the layers that one token meets."""
        return self.shared_weights + self.expert_weights * self.expert_share

    @property
    def total_bytes(self) -> int:
        """Of all weights, with the embedding, which is as large as the head."""
        return (self.shared_weights + self.expert_weights + 2 * self.head_weights) * self.weight_bytes

    @classmethod
    def from_config(cls, config: Mapping[str, Any], weight_bytes: int = _BF16_BYTES) -> "ModelShape":
        """Of a Llama or DeepSeek-V2/V3 (Moonlight) config.json. Raises InvalidProfile for another."""
        shapes = {"llama": _llama, "deepseek_v2": _latent, "deepseek_v3": _latent}
        model_type = config.get("model_type")
        if model_type not in shapes:
            raise InvalidProfile(f"config.json: model_type: is {model_type!r}, allowed are {', '.join(shapes)}")
        try:
            return shapes[model_type](config, weight_bytes)
        except KeyError as error:
            raise InvalidProfile(f"config.json: {error.args[0]}: is missing, allowed are positive integers") from None


def _llama(config: Mapping[str, Any], weight_bytes: int) -> ModelShape:
    """Grouped-query attention: scores and values take a product and a sum each per head and dimension."""
    layers, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    attention = 2 * (heads + kv_heads) * head_dim * hidden
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        shared_weights=layers * (attention + 3 * hidden * config["intermediate_size"]),
        head_weights=config["vocab_size"] * hidden,
        pair_flops=4 * layers * heads * head_dim,
        context_flops=4 * layers * heads * head_dim,
        kv_bytes_per_token=2 * layers * kv_heads * head_dim * weight_bytes,
        kv_heads=kv_heads,
        weight_bytes=weight_bytes,
    )


def _latent(config: Mapping[str, Any], weight_bytes: int) -> ModelShape:
    """Latent attention: prompts compute it expanded, decoding absorbed, over one latent and rope key for all heads."""
    layers, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    key_dim, value_dim = config["qk_nope_head_dim"] + rope, config["v_head_dim"]
    moe_layers = layers - min(int(config.get("first_k_dense_replace") or 0), layers)
    experts = config["n_routed_experts"]
    expert = 3 * hidden * config["moe_intermediate_size"]
    dense = (layers - moe_layers) * 3 * hidden * config["intermediate_size"]
    each_moe = (config.get("n_shared_experts") or 0) * expert + experts * hidden
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        shared_weights=layers * _latent_attention_weights(config) + dense + moe_layers * each_moe,
        head_weights=config["vocab_size"] * hidden,
        pair_flops=2 * layers * heads * (key_dim + value_dim),
        context_flops=2 * layers * heads * (2 * rank + rope),
        kv_bytes_per_token=layers * (rank + rope) * weight_bytes,
        kv_heads=1,
        expert_weights=moe_layers * experts * expert,
        num_experts=experts,
        experts_per_token=config["num_experts_per_tok"],
        weight_bytes=weight_bytes,
    )


def _latent_attention_weights(config: Mapping[str, Any]) -> int:
    """Of one layer."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query_dim, query_rank = heads * (nope + rope), config.get("q_lora_rank")
    query = query_rank * (hidden + query_dim) if query_rank else hidden * query_dim
    return int(query + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden)


# As published.
LLAMA3_70B = ModelShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
)
MOONLIGHT_16B_A3B = ModelShape.from_config(
    {
        "model_type": "deepseek_v3",
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "vocab_size": 163840,
    }
)
MODELS: Mapping[str, ModelShape] = {"LLaMA3-70B": LLAMA3_70B, "Moonlight-16B-A3B": MOONLIGHT_16B_A3B}
