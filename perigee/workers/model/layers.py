"""Projections and rotary embedding, as every model here uses them."""

import torch
from torch import Tensor, nn

from perigee.workers.kernels.base import Kernels
from perigee.workers.model.config import RopeConfig


class Projection(nn.Module):
    """A linear map by the model's kernels. Unlike torch's it is not initialised: its weights come from a checkpoint."""

    def __init__(self, width: int, outputs: int, kernels: Kernels, *, bias: bool = False) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(outputs, width))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # [tokens, outputs]
        return self.kernels.linear(x, self.weight, self.bias)


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
