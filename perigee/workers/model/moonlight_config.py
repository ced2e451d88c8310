"""Moonlight's architecture: DeepSeek-V3's, and DeepSeek-V2's where it differs in the router only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perigee.kvstore.blocks import DType, PayloadLayout
from perigee.workers.kernels.base import Routing
from perigee.workers.model.config_fields import one_of, positive
from perigee.workers.model.errors import UnsupportedModel
from perigee.workers.model.moba_config import MobaConfig
from perigee.workers.model.rope import RopeConfig


@dataclass(frozen=True, slots=True)
class MoonlightConfig:
    """A model with multi-head latent attention and a mixture of experts. Sizes are in elements."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_layers: int
    num_dense_layers: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int  # of a head's query and key, without position
    rope_dim: int
    value_dim: int
    num_shared_experts: int
    router: Routing
    rms_norm_eps: float
    rope: RopeConfig
    interleaved_rope: bool  # whether a checkpoint's pairs to rotate lie side by side, as DeepSeek publishes them
    max_context: int
    tie_word_embeddings: bool
    moba: MobaConfig | None

    @property
    def latent_width(self) -> int:
        """What is cached of a token: the normalised latent, then the rotated key that all heads share."""
        return self.kv_lora_rank + self.rope_dim

    @property
    def score_scale(self) -> float:
        """What a query's product with a key is multiplied with."""
        return float((self.nope_dim + self.rope_dim) ** -0.5 * self.rope.score_magnitude)

    def payload_layout(self, dtype: DType, block_tokens: int) -> PayloadLayout:
        """A block of this model: the latents of every layer."""
        return PayloadLayout(self.num_layers, 1, self.latent_width, dtype, block_tokens)

    def step_weights(self, num_sequences: int) -> float:
        """All matrices, but of the experts only those that somebody chose, if the choices are independent."""
        router = self.router
        unchosen = (1 - router.experts_per_token / router.num_experts) ** num_sequences
        experts = router.num_experts * (1 - unchosen) + self.num_shared_experts
        moe = experts * self._expert_weights + router.num_experts * self.hidden_size
        return self._shared_weights + self._num_moe_layers * moe + self._head_weights

    def decode_flops(self, context: int) -> float:
        """A product and a sum per weight that the token meets, and absorbed attention."""
        attention = 2 * self.num_layers * self.num_heads * (2 * self.kv_lora_rank + self.rope_dim) * context
        return 2 * self.step_weights(1) + attention

    def prefill_flops(self, num_tokens: int) -> float:
        """A product and a sum per weight that a token meets, the head once, and causal attention in expanded form."""
        per_token = self.step_weights(1) - self._head_weights
        head_dims = self.nope_dim + self.rope_dim + self.value_dim
        attention = self.num_layers * self.num_heads * head_dims * num_tokens**2
        return 2 * num_tokens * per_token + 2 * self._head_weights + attention

    @property
    def _num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def _expert_weights(self) -> int:
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def _head_weights(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def _shared_weights(self) -> int:
        """Attention of all layers, and the layers that have no experts."""
        query_dim = self.num_heads * (self.nope_dim + self.rope_dim)
        hidden, rank = self.hidden_size, self.q_lora_rank
        query = rank * (hidden + query_dim) if rank else hidden * query_dim
        up = self.kv_lora_rank * self.num_heads * (self.nope_dim + self.value_dim)
        attention = query + hidden * self.latent_width + up + self.num_heads * self.value_dim * hidden
        return self.num_layers * attention + self.num_dense_layers * 3 * hidden * self.intermediate_size

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "MoonlightConfig":
        """Raises UnsupportedModel for what this model does not do, naming the key."""
        one_of(config, "hidden_act", ("silu",))
        one_of(config, "moe_layer_freq", (1,))
        one_of(config, "attention_bias", (False,))
        router = _routing(config, config["model_type"])
        _check(router)
        layers = positive(config, "num_hidden_layers")
        return cls(
            vocab_size=positive(config, "vocab_size"),
            hidden_size=positive(config, "hidden_size"),
            intermediate_size=positive(config, "intermediate_size"),
            moe_intermediate_size=positive(config, "moe_intermediate_size"),
            num_layers=layers,
            num_dense_layers=min(int(config.get("first_k_dense_replace", 0)), layers),
            num_heads=positive(config, "num_attention_heads"),
            q_lora_rank=positive(config, "q_lora_rank") if config.get("q_lora_rank") is not None else None,
            kv_lora_rank=positive(config, "kv_lora_rank"),
            nope_dim=positive(config, "qk_nope_head_dim"),
            rope_dim=positive(config, "qk_rope_head_dim"),
            value_dim=positive(config, "v_head_dim"),
            num_shared_experts=int(config.get("n_shared_experts") or 0),
            router=router,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_json(config),
            interleaved_rope=bool(config.get("rope_interleave", True)),
            max_context=positive(config, "max_position_embeddings"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            moba=MobaConfig.from_json(config["moba"]) if config.get("moba") else None,
        )


def _routing(config: Mapping[str, Any], version: str) -> Routing:
    """`version` is the model_type: what a configuration leaves out is that version's habit."""
    is_v3 = version == "deepseek_v3"
    biased, unbiased = ("noaux_tc",), ("greedy", "group_limited_greedy")
    method = one_of(config, "topk_method", biased + unbiased if is_v3 else unbiased + biased)
    grouped = method != "greedy"
    return Routing(
        num_experts=positive(config, "n_routed_experts"),
        experts_per_token=positive(config, "num_experts_per_tok"),
        method=method,
        scoring=one_of(config, "scoring_func", ("sigmoid", "softmax") if is_v3 else ("softmax", "sigmoid")),
        num_groups=(config.get("n_group") or 1) if grouped else 1,
        groups_per_token=(config.get("topk_group") or 1) if grouped else 1,
        normalise=bool(config.get("norm_topk_prob", is_v3)),
        scaling_factor=float(config.get("routed_scaling_factor", 1.0)),
    )


def _check(router: Routing) -> None:
    """Raises UnsupportedModel for numbers that do not fit together."""
    if router.method != "noaux_tc" and router.normalise and router.scaling_factor != 1:
        # DeepSeek-V2's published code does not scale what it normalised; others do.
        raise UnsupportedModel(f"config.json: norm_topk_prob: true is not supported with {router.method!r} and a scale")
    if router.num_experts % router.num_groups:
        raise UnsupportedModel(f"config.json: n_group: {router.num_groups} does not divide {router.num_experts}")
    if router.groups_per_token > router.num_groups:
        raise UnsupportedModel(f"config.json: topk_group: {router.groups_per_token} of {router.num_groups} groups")
    eligible = router.num_experts // router.num_groups * router.groups_per_token
    if router.experts_per_token > eligible:
        raise UnsupportedModel(f"config.json: num_experts_per_tok: {router.experts_per_token} of {eligible} eligible")
