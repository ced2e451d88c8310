"""The kernels in plain torch: any dtype, any device, differentiable. What the native ones are held against."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from perigee.workers.attention.moba import choose_blocks
from perigee.workers.kernels.base import Captured, Chosen, DecodeBatch, Matrix, Rope, Routing


class TorchKernels:
    """See `Kernels`."""

    def matrices(self, *weights: Tensor) -> tuple[Matrix, ...]:
        return tuple(map(Matrix, weights))

    def rows(self, matrix: Matrix, indices: Tensor) -> Tensor:
        return F.embedding(indices, matrix.tensor)

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, matrix.tensor, bias)

    def logits(self, x: Tensor, matrix: Matrix) -> Tensor:
        return F.linear(x, matrix.tensor).float()

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x if delta is None else x + delta
        return total, F.rms_norm(total, weight.shape, weight, eps)

    def gated_silu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rotate_and_store(
        self, qkv: Tensor, rope: Rope, rows: Tensor, keys: Tensor, values: Tensor, num_heads: int
    ) -> Tensor:
        tokens, total_heads, _ = qkv.shape
        rotated_heads = (total_heads + num_heads) // 2  # all but the values
        rotated = rotate(qkv[:, :rotated_heads], rope)
        keys.index_copy_(0, rows, rotated[:, num_heads:].reshape(tokens, -1))
        values.index_copy_(0, rows, qkv[:, rotated_heads:].reshape(tokens, -1))
        return rotated[:, :num_heads]

    def rotate_and_store_latent(
        self, q: Tensor, latent: Tensor, norm: Tensor, eps: float, rope: Rope, rows: Tensor, latents: Tensor
    ) -> Tensor:
        rank, rope_dim = len(norm), rope.cos.shape[-1]
        latents[rows, :rank] = F.rms_norm(latent[:, :rank], norm.shape, norm, eps)
        latents[rows, rank:] = rotate(latent[:, None, rank:], rope)[:, 0]
        return torch.cat([q[..., :-rope_dim], rotate(q[..., -rope_dim:], rope)], dim=-1)

    def linear_heads(self, x: Tensor, matrix: Matrix) -> Tensor:
        width = matrix.tensor.shape[-1]
        mapped = torch.matmul(x[..., :width].transpose(0, 1), matrix.tensor.transpose(1, 2)).transpose(0, 1)
        return torch.cat([mapped, x[..., width:]], dim=-1)

    def route(self, x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.float(), weight.float())
        scores = logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(dim=-1)
        ranked = scores if bias is None else scores + bias
        if routing.num_groups > 1:
            ranked = _within_best_groups(ranked, routing)
        experts = ranked.topk(routing.experts_per_token, dim=-1, sorted=False).indices
        weights = scores.gather(-1, experts)
        if routing.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * routing.scaling_factor, experts

    def experts(self, x: Tensor, chosen: Chosen, gate_up: Matrix, down: Matrix) -> Tensor:
        weights, order, counts = _by_expert(chosen, len(gate_up.tensor))
        per_token = weights.shape[1]
        first = 0
        made: list[Tensor] = []
        for expert, count in enumerate(counts):
            if count:
                rows = x[order[first : first + count] // per_token]
                hidden = self.gated_silu(F.linear(rows, gate_up.tensor[expert]))
                made.append(F.linear(hidden, down.tensor[expert]))
            first += count
        out = torch.empty(weights.numel(), x.shape[1], dtype=x.dtype, device=x.device)
        out[order] = torch.cat(made)
        return torch.einsum("tkw,tk->tw", out.view(*weights.shape, -1).float(), weights).to(x.dtype)

    def attend_chunk(
        self, q: Tensor, keys: Tensor, values: Tensor, start: int, scale: float, shared_keys: Tensor | None = None
    ) -> Tensor | None:
        return None

    def choose_blocks(self, q: Tensor, centroids: Tensor, start: int, block_size: int, count: int) -> Tensor:
        return choose_blocks(q, centroids, start, block_size, count)

    def attend_sparse(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        start: int,
        scale: float,
        chosen: Tensor,
        block_size: int,
        shared_keys: Tensor | None = None,
    ) -> Tensor | None:
        return None

    def capture(self, step: Callable[[], None]) -> Captured | None:
        step()
        return None

    def attend_decode(self, q: Tensor, keys: Tensor, values: Tensor, batch: DecodeBatch, scale: float) -> Tensor | None:
        return None


def _within_best_groups(ranked: Tensor, routing: Routing) -> Tensor:
    """`ranked` [tokens, experts] with -inf for the experts of all groups but the best."""
    groups = ranked.view(len(ranked), routing.num_groups, -1)
    scores = groups.topk(min(routing.best_of_group, groups.shape[-1]), dim=-1).values.sum(dim=-1)
    kept = scores.topk(routing.groups_per_token, dim=-1, sorted=False).indices
    dropped = torch.ones_like(scores, dtype=torch.bool).scatter_(1, kept, False)
    return groups.masked_fill(dropped[..., None], -torch.inf).view_as(ranked)


def _by_expert(chosen: Chosen, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Weights with the shared experts' among them, [tokens, k]; the flat choices, each token * k + i, sorted by expert;
    and how many choices each expert has."""
    tokens = len(chosen.experts)
    shared = torch.arange(num_experts - chosen.num_shared, num_experts, device=chosen.experts.device)
    experts = torch.cat([chosen.experts, shared.expand(tokens, -1)], dim=1).flatten()
    weights = torch.cat([chosen.weights, chosen.weights.new_ones(tokens, chosen.num_shared)], dim=1)
    return weights, experts.argsort(stable=True), experts.bincount(minlength=num_experts).tolist()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates each head of x [tokens, heads, dim]. The result's halves are the real and imaginary parts: with the sines
    of the first half negated, that takes one roll and no sign flip."""
    if rope.interleaved:
        x = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
    return x * rope.cos + x.roll(x.shape[-1] // 2, dims=-1) * rope.sin
