"""What one step of Muon or AdamW does to tensors: whole ones, or the flat part of them that one process owns."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from perigee.training.newton_schulz import orthogonalise

# The root mean square of AdamW's updates, which Muon's are scaled to: so learning rate and decay of one suit the other.
UPDATE_RMS = 0.2


def look_ahead(gradient: Tensor, momentum: Tensor, factor: float) -> Tensor:
    """Moves `momentum` on by `gradient`, and returns where Nesterov's rule looks: factor · momentum + gradient."""
    momentum.mul_(factor).add_(gradient)
    return gradient.add(momentum, alpha=factor)


def muon_updates(directions: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each of `directions`, [A, B] or many such matrices [n, A, B], orthogonalised in `dtype` and scaled by
    0.2 √max(A, B) ("Muon is Scalable for LLM Training", 2.2), in float32.

    Matrices of one shape, or one transposed, go through the iteration together: one product for all experts.
    """
    updates = list(directions)
    for (short, long), indices in _by_shape(directions).items():
        parts = [_wide(directions[index]).reshape(-1, short, long).to(dtype) for index in indices]
        scaled = orthogonalise(torch.cat(parts), dtype).float() * (UPDATE_RMS * long**0.5)
        for index, part in zip(indices, torch.split(scaled, [len(part) for part in parts]), strict=True):
            rows, columns = directions[index].shape[-2:]
            updates[index] = (part if rows <= columns else part.mT).reshape(directions[index].shape)
    return updates


def adamw_update(
    gradient: Tensor, moments: tuple[Tensor, Tensor], step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Moves both `moments`, the mean and the mean square, on by `gradient`, the `step`-th from 1, and returns the
    update (Loshchilov and Hutter)."""
    mean, square = moments
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    unbiased = (square / (1 - betas[1] ** step)).sqrt_().add_(eps)
    return (mean / (1 - betas[0] ** step)).div_(unbiased)


def apply_update(weights: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
    """Decays `weights` apart from the update, then moves them against it."""
    weights.mul_(1 - lr * weight_decay).add_(update, alpha=-lr)


def _by_shape(matrices: Iterable[Tensor]) -> dict[tuple[int, int], list[int]]:
    """(shorter side, longer side) → indices."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        rows, columns = matrix.shape[-2:]
        found[min(rows, columns), max(rows, columns)].append(index)
    return found


def _wide(matrices: Tensor) -> Tensor:
    return matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
