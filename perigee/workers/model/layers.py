"""Rotary embedding, as every model here uses it."""

import torch
from torch import Tensor

from perigee.workers.model.config import RopeConfig


class RotaryTable:
    """Cosines and sines of every position, computed once in float32 and kept in the model's dtype.

    The sines of a head's first half are negated: see `rotate` in `perigee.workers.kernels.reference`.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, max_context: int, dtype: torch.dtype) -> None:
        # The device is named, so that a model built on the meta device still has real tables.
        frequencies = torch.tensor(rope.inverse_frequencies(head_dim), dtype=torch.float32, device="cpu")
        angles = torch.arange(max_context, dtype=torch.float32, device="cpu")[:, None] * frequencies
        sin = angles.sin()
        self.cos = torch.cat([angles.cos()] * 2, dim=-1).to(dtype)
        self.sin = torch.cat([-sin, sin], dim=-1).to(dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) for `positions` [tokens], each [tokens, 1, head_dim]."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
