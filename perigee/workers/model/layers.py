"""Projections, the gated MLP and rotary embedding, as every model here uses them."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perigee.workers.kernels.base import Kernels, Matrix, Rope
from perigee.workers.model.rope import RopeConfig


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint belongs: a view of a parameter, which may be strided, of the same elements in the
    same order."""

    view: Tensor
    shape: tuple[int, ...]  # of the checkpoint's tensor

    @classmethod
    def of(cls, view: Tensor) -> "Place":
        """The place of a tensor that is kept as it is."""
        return cls(view, tuple(view.shape))


class Prepared(nn.Module):
    """A module that lays its parameters out for the kernels once they are filled. Nobody reads them after that."""

    @abstractmethod
    def prepare(self) -> None: ...


class Projection(Prepared):
    """A linear map by the model's kernels. Unlike torch's it is not initialised: its weights come from a checkpoint."""

    def __init__(self, width: int, outputs: int, kernels: Kernels, *, bias: bool = False) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(outputs, width))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.matrix = Matrix(self.weight)

    def prepare(self) -> None:
        (self.matrix,) = self.kernels.matrices(self.weight)

    def forward(self, x: Tensor) -> Tensor:  # [tokens, outputs]
        return self.kernels.linear(x, self.matrix, self.bias)

    def places(self, prefix: str, names: tuple[str, ...], sizes: tuple[int, ...]) -> Iterator[tuple[str, Place]]:
        """The checkpoint's matrices `names` whose rows, `sizes` of each, are stacked here."""
        for kind, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor is not None:
                first = 0
                for name, size in zip(names, sizes, strict=True):
                    yield f"{prefix}.{name}.{kind}", Place.of(tensor[first : first + size])
                    first += size


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up as one matrix: on a CPU the number of calls counts, not only bytes."""

    def __init__(self, width: int, intermediate: int, kernels: Kernels, *, bias: bool = False) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up = Projection(width, 2 * intermediate, kernels, bias=bias)
        self.down = Projection(intermediate, width, kernels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # [tokens, width]
        out: Tensor = self.down(self.kernels.gated_silu(self.gate_up(x)))
        return out

    def places(self, prefix: str) -> Iterator[tuple[str, Place]]:
        sizes = (len(self.gate_up.weight) // 2,) * 2
        yield from self.gate_up.places(prefix, ("gate_proj", "up_proj"), sizes)
        yield from self.down.places(prefix, ("down_proj",), (len(self.down.weight),))


class RotaryTable:
    """Cosines and sines of every position, computed once in float32 and kept in the model's dtype."""

    def __init__(self, rope: RopeConfig, head_dim: int, max_context: int, *, interleaved: bool = False) -> None:
        # The device is named, so that a model built on the meta device still has real tables.
        frequencies = torch.tensor(rope.inverse_frequencies(head_dim), dtype=torch.float32, device="cpu")
        angles = torch.arange(max_context, dtype=torch.float32, device="cpu")[:, None] * frequencies
        cos, sin = angles.cos() * rope.magnitude, angles.sin() * rope.magnitude
        dtype = torch.get_default_dtype()
        self.cos = torch.cat([cos, cos], dim=-1).to(dtype)
        self.sin = torch.cat([-sin, sin], dim=-1).to(dtype)
        self.interleaved = interleaved

    def at(self, positions: Tensor) -> Rope:
        """What rotates tokens at `positions` [tokens]."""
        return Rope(self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1), self.interleaved)
