"""Muon: momentum whose matrices are orthogonalised before they move the weights, beside AdamW for all else."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from perigee.training.errors import TrainingError
from perigee.training.rules import adamw_update, apply_update, look_ahead, muon_updates

Kind = Literal["muon", "adamw"]

# What looks like a matrix but is a table of rows: each row has its own gradient, and most have none.
_TABLES = ("embed_tokens.weight", "lm_head.weight")


def parameter_groups(parameters: Iterable[tuple[str, Tensor]], matrices: Kind = "muon") -> list[dict[str, Any]]:
    """A group of matrices for Muon and one of embeddings, head, norms and other vectors for AdamW, in the names' order.

    Names are a checkpoint's. `matrices` says which rule those of the first group get; that of the second is AdamW.
    """
    groups: tuple[list[Tensor], list[Tensor]] = [], []
    for name, parameter in parameters:
        groups[parameter.dim() < 2 or name.endswith(_TABLES)].append(parameter)
    kinds: tuple[Kind, Kind] = matrices, "adamw"
    return [{"params": params, "kind": kind} for params, kind in zip(groups, kinds, strict=True) if params]


class Muon(Optimizer):
    """Muon as in "Muon is Scalable for LLM Training", section 2, for groups of kind `muon`; AdamW for kind `adamw`.

    A group's `kind` is `muon` unless it says otherwise; `parameter_groups` makes both. A parameter of a Muon group is a
    matrix [out, in], or one [experts, out, in] for each expert. Learning rate and decay mean the same for both kinds.
    Newton–Schulz runs in `dtype`: bfloat16 suffices and is several times as fast where there are matrix units.

    Raises TrainingError for an option out of its range, or a vector among a Muon group's parameters.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        defaults = {
            "kind": "muon",
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults)
        self.dtype = dtype
        for group in self.param_groups:
            _check(group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves every parameter that has a gradient. Returns what `closure`, which computes them, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            self._move(index, group)
        return loss

    def _move(self, index: int, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        updates = self._muon if group["kind"] == "muon" else self._adamw
        for parameter, update in zip(parameters, updates(parameters, group), strict=True):
            apply_update(parameter, update, group["lr"], group["weight_decay"])

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        return muon_updates([self._direction(parameter, group) for parameter in parameters], self.dtype)

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return look_ahead(_gradient(parameter), state["momentum_buffer"], group["momentum"])

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        return [self._adamw_one(parameter, group) for parameter in parameters]

    def _adamw_one(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state.update(
                step=torch.zeros(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
            )
        state["step"] += 1
        moments = state["exp_avg"], state["exp_avg_sq"]
        return adamw_update(_gradient(parameter), moments, int(state["step"]), group["betas"], group["eps"])


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None  # `step` leaves out those without
    return parameter.grad


def _check(group: dict[str, Any]) -> None:
    """Raises TrainingError, naming the field and the value."""
    if group["kind"] not in get_args(Kind):
        raise TrainingError(f"kind: {group['kind']!r} given, allowed are {', '.join(get_args(Kind))}")
    for name in ("lr", "weight_decay", "eps"):
        if not group[name] >= 0:
            raise TrainingError(f"{name}: {group[name]} given, allowed is 0 or more")
    for name, value in (("momentum", group["momentum"]), *(("betas", beta) for beta in group["betas"])):
        if not 0 <= value < 1:
            raise TrainingError(f"{name}: {value} given, allowed is 0 up to, but not, 1")
    for parameter in group["params"]:
        if group["kind"] == "muon" and parameter.dim() not in (2, 3):
            raise TrainingError(
                f"params: one of shape {list(parameter.shape)} in a group of kind 'muon', allowed are matrices "
                "[out, in] and [experts, out, in]"
            )
