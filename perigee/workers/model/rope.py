"""How a checkpoint encodes positions: rotary frequencies, scaled as it was trained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from perigee.workers.model.config_fields import one_of, positive
from perigee.workers.model.errors import UnsupportedModel

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. What follows `factor` belongs to Llama 3's or YaRN's frequency scaling.

    The two magnitudes are YaRN's: what cosines and sines, and what attention scores are multiplied with.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0
    score_magnitude: float = 1.0

    def inverse_frequencies(self, dim: int) -> list[float]:
        """`dim` / 2 frequencies in radians a position, scaled as the checkpoint was trained."""
        plain = [self.theta ** (-2 * i / dim) for i in range(dim // 2)]
        if self.kind == "linear":
            return [frequency / self.factor for frequency in plain]
        if self.kind == "llama3":
            return [self._llama3(frequency) for frequency in plain]
        if self.kind == "yarn":
            return self._yarn(plain, dim)
        return plain

    def _llama3(self, frequency: float) -> float:
        """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""
        wavelength = 2 * math.pi / frequency
        if wavelength < self.original_max_position / self.high_freq_factor:
            return frequency
        if wavelength > self.original_max_position / self.low_freq_factor:
            return frequency / self.factor
        turns = self.original_max_position / wavelength
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - smooth) * frequency / self.factor + smooth * frequency

    def _yarn(self, plain: list[float], dim: int) -> list[float]:
        """Dimensions that turn often are kept, those that turn seldom stretched, those between blended (YaRN, 3.2)."""
        low = max(math.floor(self._dimension(self.beta_fast, dim)), 0)
        high = min(math.ceil(self._dimension(self.beta_slow, dim)), dim - 1)
        width = max(high - low, 1e-3)
        stretched = [min(max((i - low) / width, 0.0), 1.0) for i in range(dim // 2)]
        return [f * (1 - part) + f / self.factor * part for f, part in zip(plain, stretched, strict=True)]

    def _dimension(self, turns: float, dim: int) -> float:
        """Which pair of dimensions turns this often within the context of training."""
        return dim * math.log(self.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "RopeConfig":
        """Both spellings: `rope_theta` with `rope_scaling`, and the newer `rope_parameters`.

        Raises UnsupportedModel for a kind of scaling that is not known here, or not in this form.
        """
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in get_args(RopeKind):
            allowed = ", ".join(get_args(RopeKind))
            raise UnsupportedModel(f"config.json: rope_type: {kind!r} is not supported, only {allowed}")
        one_of(scaling, "truncate", (True,))
        factor = float(scaling.get("factor", 1.0))
        max_position = positive(config, "max_position_embeddings")
        magnitude, score_magnitude = _yarn_magnitudes(scaling, factor) if kind == "yarn" else (1.0, 1.0)
        return cls(
            theta=float(scaling.get("rope_theta", config.get("rope_theta", 10000.0))),
            kind=kind,
            factor=factor,
            low_freq_factor=float(scaling.get("low_freq_factor", 1.0)),
            high_freq_factor=float(scaling.get("high_freq_factor", 4.0)),
            original_max_position=positive(scaling, "original_max_position_embeddings", max_position),
            beta_fast=float(scaling.get("beta_fast") or 32),
            beta_slow=float(scaling.get("beta_slow") or 1),
            magnitude=magnitude,
            score_magnitude=score_magnitude,
        )


def _yarn_magnitudes(scaling: Mapping[str, Any], factor: float) -> tuple[float, float]:
    """DeepSeek's `mscale` and `mscale_all_dim`: their quotient scales cosines and sines, the latter's square scores."""
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    rotation = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1)
    if (given := scaling.get("attention_factor")) is not None:
        rotation = float(given)
    return rotation, _mscale(factor, all_dim) ** 2 if all_dim else 1.0


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
