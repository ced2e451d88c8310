"""All that decides what comes out of a training run, beside the text."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from perigee.training.stage import Stage

OptimizerName = Literal["muon", "adamw"]

# Of all steps: how many the learning rate rises for, and what part of its peak it falls to, along a cosine.
WARMUP = 0.05
FINAL_LR = 0.1
# With stages, so that the number of steps decides nothing before the fall.
STAGED_WARMUP_STEPS = 40


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of Moonlight's architecture at another size. The ratios are its own: the latent is a quarter as wide as
    the model, a head's rotated part half as wide as the rest, and 2 experts are shared."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    experts: int
    experts_per_token: int
    context: int

    def config(self) -> dict[str, Any]:
        """The config.json of a checkpoint."""
        head_dim = self.width // self.heads
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.width * 11 // 2,
            "moe_intermediate_size": self.width * 11 // 16,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "n_shared_experts": 2,
            "n_routed_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "routed_scaling_factor": 2.446,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "kv_lora_rank": self.width // 4,
            "qk_nope_head_dim": head_dim,
            "qk_rope_head_dim": head_dim // 2,
            "v_head_dim": head_dim,
            "rope_theta": 50000.0,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True, slots=True)
class Recipe:
    """One run. `sequences` of `shape.context` tokens are a step's batch."""

    shape: Shape
    optimizer: OptimizerName
    lr: float
    weight_decay: float
    sequences: int
    steps: int
    seed: int
    dtype: Literal["float32", "bfloat16"]
    text_digest: str
    max_grad_norm: float = 1.0
    stages: tuple[Stage, ...] = ()  # one after the other, instead of batches that are all alike
    mimetic: bool = False  # how weights begin, see `perigee.training.mimetic`
    decay_steps: int = 0  # at the end of stages: until then the learning rate stays at its peak

    def stage_at(self, step: int) -> Stage:
        """The stage that this step is of."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return Stage(self.shape.context, self.sequences, self.steps)

    def lr_at(self, step: int) -> float:
        """A rise along a line; then a fall along a cosine, or, with stages, one along a line at the end."""
        if self.stages:
            rising, falling = (step + 1) / STAGED_WARMUP_STEPS, (self.steps - step) / self.decay_steps
            return self.lr * min(1.0, rising, falling)
        warmup = max(1, round(self.steps * WARMUP))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * done)) / 2)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def digest(self) -> str:
        """Names the run: equal recipes have equal ones."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Recipe":
        stages = tuple(Stage(**stage) for stage in values["stages"])
        return cls(**{**values, "shape": Shape(**values["shape"]), "stages": stages})
