"""The kernels for training: as in plain torch, in forms whose gradients are fast, for whole batches alone."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perigee.workers.kernels.base import Chosen, Matrix, Rope
from perigee.workers.kernels.reference import TorchKernels, rotate

# An expert's rows are filled up to a multiple of this: the libraries below prepare themselves for each new shape, which
# takes longer than to compute some rows for nothing.
ROUNDING = 128


class TrainableKernels(TorchKernels):
    """See `Kernels`. A pool's rows are those of the batch, in its order."""

    def rotate_and_store_latent(
        self, q: Tensor, latent: Tensor, norm: Tensor, eps: float, rope: Rope, rows: Tensor, latents: Tensor
    ) -> Tensor:
        rank, rope_dim = len(norm), rope.cos.shape[-1]
        normed = F.rms_norm(latent[:, :rank], norm.shape, norm, eps)
        latents.copy_(torch.cat([normed, rotate(latent[:, None, rank:], rope)[:, 0]], dim=-1))
        return torch.cat([q[..., :-rope_dim], rotate(q[..., -rope_dim:], rope)], dim=-1)

    def experts(self, x: Tensor, chosen: Chosen, gate_up: Matrix, down: Matrix) -> Tensor:
        num_routed = len(gate_up.tensor) - chosen.num_shared
        places, sizes = _places(chosen.experts, num_routed)
        rows: Tensor = _Spread.apply(x, places, sum(sizes))  # type: ignore[no-untyped-call]  # torch's
        # Unbound, so that their gradients are stacked once rather than each added to zeros of the whole stack's size.
        experts = list(zip(gate_up.tensor.unbind(), down.tensor.unbind(), strict=True))
        parts = zip(torch.split(rows, sizes), experts[:num_routed], strict=True)
        made = torch.cat([self._expert(part, *expert) for part, expert in parts if len(part)])
        collected: Tensor = _Collect.apply(made, places)  # type: ignore[no-untyped-call]  # torch's
        total = (collected * chosen.weights[..., None].to(x.dtype)).sum(dim=1)
        for expert in experts[num_routed:]:
            total = total + self._expert(x, *expert)
        return total

    def _expert(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return F.linear(self.gated_silu(F.linear(x, gate_up)), down)


def _places(experts: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Where each choice of `experts` [tokens, k] goes when they are sorted by expert, of the same shape, and how many
    places each expert has."""
    flat = experts.flatten()
    counts = flat.bincount(minlength=num_experts)
    sizes = (counts + ROUNDING - 1) // ROUNDING * ROUNDING
    order = flat.argsort(stable=True)
    gaps = ((sizes - counts).cumsum(0) - (sizes - counts)).repeat_interleave(counts)
    places = torch.empty_like(flat)
    places[order] = torch.arange(len(flat), device=flat.device) + gaps
    return places.view_as(experts), sizes.tolist()


class _Spread(torch.autograd.Function):
    """Each row of x [tokens, width] at each of its `places` [tokens, k], in [count, width]; nothing of use elsewhere.

    Its gradient is gathered, where torch's own would be added up row by row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        sources = places.new_zeros(count)
        sources[places.flatten()] = torch.arange(len(x), device=x.device).repeat_interleave(places.shape[1])
        return x[sources]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient[places].sum(dim=1), None, None


class _Collect(torch.autograd.Function):
    """made[places], of different places alone: its gradient is written, where torch's own would be added up."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(made)
        return made[places]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.count, gradient.shape[-1])
        whole[places] = gradient
        return whole, None
