"""Keeps the experts' loads even without a loss for it (DeepSeek-V3, 2.1.2)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from perigee.training.model import TrainedModel

# How far a step moves the bias of an expert that had more or less than its share: DeepSeek-V3's.
RATE = 0.001


class Balance:
    """Counts the tokens that choose each expert, and moves the biases against the loads when told to.

    Counts while the decoder collects gradients, so that an evaluation leaves no trace.
    """

    def __init__(self, model: TrainedModel) -> None:
        self._biases: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}
        for index, router in model.decoder.routers():
            if router.bias is not None:
                self._biases[index] = model.weights[f"model.layers.{index}.mlp.gate.e_score_correction_bias"]
                self._counts[index] = torch.zeros(len(router.bias), dtype=torch.int64)
                router.register_forward_hook(self._counter(index))

    def imbalance(self) -> float:
        """The greatest of all layers' greatest loads, over the mean load; 1 is even. 0 if nothing was counted."""
        return max(
            (float(count.max() / count.double().mean()) for count in self._counts.values() if count.any()), default=0
        )

    @torch.no_grad()
    def update(self) -> None:
        """Moves each bias up where the load was below the mean and down where it was above, and forgets the loads."""
        for index, count in self._counts.items():
            self._biases[index].add_((count.double().mean() - count).sign(), alpha=RATE)
            count.zero_()

    def _counter(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], tuple[Tensor, Tensor]], None]:
        def count(router: nn.Module, inputs: tuple[Any, ...], chosen: tuple[Tensor, Tensor]) -> None:
            if torch.is_grad_enabled():
                counts = self._counts[index]
                counts += chosen[1].flatten().bincount(minlength=len(counts))

        return count
