"""Which part of all weights each process owns."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements `first` up to `stop` of tensors that lie end to end."""

    first: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.first)

    def within(self, other: "Slice") -> "Slice":
        """What both have in common, perhaps nothing."""
        first = max(self.first, other.first)
        return Slice(first, max(first, min(self.stop, other.stop)))

    def of(self, flat: Tensor, base: int = 0) -> Tensor:
        """A view of `flat`, whose first element is number `base`."""
        return flat[self.first - base : self.stop - base]


@dataclass(frozen=True)
class Partition:
    """Tensors of `shapes`, laid end to end and cut into as many ranges of one size as there are processes (ZeRO-1).

    The last range is shorter if the total is no multiple of the number of processes.
    """

    shapes: tuple[torch.Size, ...]
    num_ranks: int

    @cached_property
    def total(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    def of_rank(self, rank: int) -> Slice:
        """What `rank` owns."""
        size = -(-self.total // self.num_ranks)
        return Slice(min(rank * size, self.total), min((rank + 1) * size, self.total))

    @cached_property
    def ranks(self) -> tuple[Slice, ...]:
        """What each process owns."""
        return tuple(map(self.of_rank, range(self.num_ranks)))

    @cached_property
    def tensors(self) -> tuple[Slice, ...]:
        """Where each tensor lies."""
        stops = list(accumulate(shape.numel() for shape in self.shapes))
        return tuple(Slice(stop - shape.numel(), stop) for stop, shape in zip(stops, self.shapes, strict=True))

    def matrices(self, rank: int) -> Iterator[tuple[Slice, torch.Size]]:
        """Each matrix of which `rank` owns a part, and its shape: of experts stacked in one tensor, each expert's."""
        own = self.of_rank(rank)
        for whole, shape in zip(self.tensors, self.shapes, strict=True):
            size = shape[-2:].numel()
            for first in range(whole.first, whole.stop, size):
                matrix = Slice(first, first + size)
                if len(matrix.within(own)):
                    yield matrix, torch.Size(shape[-2:])

    def window(self, rank: int) -> Slice:
        """From the start of the first matrix of which `rank` owns a part to the end of the last one."""
        places = [place for place, _ in self.matrices(rank)]
        return Slice(places[0].first, places[-1].stop) if places else self.of_rank(rank)

    @cached_property
    def windows(self) -> tuple[Slice, ...]:
        """What each process needs of the matrices that it updates a part of."""
        return tuple(map(self.window, range(self.num_ranks)))


def flat_part(tensors: Sequence[Tensor], places: Iterable[Slice], part: Slice) -> Tensor:
    """A copy of `part` of `tensors`, which lie end to end at `places`."""
    cuts = [(tensor, place, place.within(part)) for tensor, place in zip(tensors, places, strict=True)]
    return torch.cat([cut.of(tensor.reshape(-1), place.first) for tensor, place, cut in cuts])


def fill_part(tensors: Sequence[Tensor], places: Iterable[Slice], part: Slice, values: Tensor) -> None:
    """Writes `values` to `part` of `tensors`, which are contiguous and lie end to end at `places`."""
    for tensor, place in zip(tensors, places, strict=True):
        cut = place.within(part)
        if len(cut):
            cut.of(tensor.view(-1), place.first).copy_(cut.of(values, part.first))
