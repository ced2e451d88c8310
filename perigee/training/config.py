"""The configuration of `perigee train`."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ByteSize, Field, field_validator, model_validator

from perigee.training.recipe import OptimizerName


class TrainConfig(BaseModel, frozen=True, extra="forbid"):
    """Trains the built-in model, or another small one of Moonlight's architecture; or compares how fast Muon and AdamW
    do. What is said of text, optimizer and sizes is not for the built-in model, whose recipe is fixed."""

    output: Path = Field(default=Path("perigee-train"), description="directory of checkpoints, the model and results")
    compare: Literal["", "adamw"] = Field(
        default="", description="adamw: tune both optimizers, train with both, and tell what share of steps Muon needs"
    )
    recipe: Literal["moonlight-nano", "flags"] = Field(
        default="moonlight-nano",
        description="without --compare: the built-in model's recipe, or what the flags below say",
    )
    text: Path | None = Field(
        default=None, description="text file, or directory of them, to train on [default: Python's standard library]"
    )
    text_bytes: ByteSize = Field(default=ByteSize(4_000_000), gt=0, description="how much text to take at most")
    optimizer: OptimizerName = Field(default="muon", description="muon or adamw, for matrices; AdamW has all the rest")
    lr: float = Field(default=3e-3, gt=0, allow_inf_nan=False, description="peak learning rate")
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False, description="weight decay")
    steps: int = Field(default=200, ge=1, description="steps of a run")
    sequences: int = Field(default=8, ge=1, description="sequences of a batch")
    seed: int = Field(default=0, ge=0, description="seed of weights and batches")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="what the model computes in; its weights are kept in float32"
    )
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: all cores")
    checkpoint_s: float = Field(default=120.0, ge=0, description="seconds between checkpoints")
    vocab_size: int = Field(default=1024, ge=260, description="tokens of the vocabulary that is made of the text")
    width: int = Field(default=96, ge=16, multiple_of=16, description="width of the residual stream")
    layers: int = Field(default=3, ge=1, description="layers, the first of them without experts")
    heads: int = Field(default=4, ge=1, description="attention heads")
    experts: int = Field(default=8, ge=1, description="routed experts of a layer")
    experts_per_token: int = Field(default=2, ge=1, description="routed experts that a token chooses")
    context: int = Field(default=128, ge=2, description="tokens of a sequence")
    lrs: tuple[float, ...] = Field(
        default=(3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2), description="comparison: learning rates to try"
    )
    tune_steps: int = Field(default=100, ge=1, description="comparison: steps of a run that tries one")
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), description="comparison: seeds to train with")
    shares: tuple[float, ...] = Field(
        default=(0.4, 0.55, 0.7, 1.0), description="comparison: Muon's runs, as shares of AdamW's steps, rising"
    )
    json_file: str = Field(default="", description="write the results as JSON to this file, - for standard output")

    @field_validator("lrs", "shares")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or not all(0 < value <= 1 for value in values):
            raise ValueError("every value must be above 0 and at most 1")
        return tuple(sorted(set(values)))

    @field_validator("seeds")
    @classmethod
    def _some(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values or any(value < 0 for value in values):
            raise ValueError("needed is one seed or more, each at least 0")
        return tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        if self.width % (4 * self.heads):
            raise ValueError(f"--heads: {self.heads}: the width, {self.width}, must be a multiple of 4 * heads")
        if self.experts_per_token > self.experts:
            raise ValueError(f"--experts-per-token: {self.experts_per_token}: there are {self.experts} experts")
        return self
