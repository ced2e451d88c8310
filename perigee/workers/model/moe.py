"""Mixture of experts: each token passes through the few experts that it chooses, and through those that all share."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from perigee.workers.kernels.base import Chosen, Kernels, Matrix, Routing
from perigee.workers.model.layers import Place, Prepared
from perigee.workers.model.moonlight_config import MoonlightConfig


class Router(nn.Module):
    """Which experts each token goes to, and with what weight."""

    def __init__(self, config: Routing, width: int, kernels: Kernels) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        # For the choice alone: training moved it to keep the experts' loads even.
        has_bias = config.method == "noaux_tc"
        self.bias = nn.Parameter(torch.empty(config.num_experts, dtype=torch.float32)) if has_bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # weights and experts, each [tokens, experts_per_token]
        return self.kernels.route(x, self.weight, self.bias, self.config)

    def places(self, prefix: str) -> Iterator[tuple[str, Place]]:
        yield f"{prefix}.weight", Place.of(self.weight)
        if self.bias is not None:
            yield f"{prefix}.e_score_correction_bias", Place.of(self.bias)


class MixtureOfExperts(Prepared):
    """Routed and shared experts in one stack: a shared expert is one that every token chooses, with weight 1."""

    def __init__(self, config: MoonlightConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.num_routed = config.router.num_experts
        self.num_shared = config.num_shared_experts
        self.intermediate = config.moe_intermediate_size
        self.router = Router(config.router, config.hidden_size, kernels)
        experts = self.num_routed + self.num_shared
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * self.intermediate, config.hidden_size))
        self.down = nn.Parameter(torch.empty(experts, config.hidden_size, self.intermediate))
        self.matrices: tuple[Matrix, ...] = (Matrix(self.gate_up), Matrix(self.down))

    def prepare(self) -> None:
        self.matrices = self.kernels.matrices(self.gate_up, self.down)

    def forward(self, x: Tensor) -> Tensor:  # [tokens, hidden]
        weights, experts = self.router(x)
        return self.kernels.experts(x, Chosen(experts, weights, self.num_shared), *self.matrices)

    def places(self, prefix: str) -> Iterator[tuple[str, Place]]:
        yield from self.router.places(f"{prefix}.gate")
        for expert in range(self.num_routed):
            name = f"{prefix}.experts.{expert}"
            yield f"{name}.gate_proj.weight", Place.of(self.gate_up[expert, : self.intermediate])
            yield f"{name}.up_proj.weight", Place.of(self.gate_up[expert, self.intermediate :])
            yield f"{name}.down_proj.weight", Place.of(self.down[expert])
        if self.num_shared:
            yield from self._shared_places(f"{prefix}.shared_experts")

    def _shared_places(self, name: str) -> Iterator[tuple[str, Place]]:
        """A checkpoint has one MLP as wide as all shared experts; cut along its intermediate width it is their sum."""
        total, hidden = self.num_shared * self.intermediate, self.down.shape[1]
        gate_up, down = self.gate_up[self.num_routed :], self.down[self.num_routed :]
        yield f"{name}.gate_proj.weight", Place(gate_up[:, : self.intermediate], (total, hidden))
        yield f"{name}.up_proj.weight", Place(gate_up[:, self.intermediate :], (total, hidden))
        yield f"{name}.down_proj.weight", Place(down.transpose(0, 1), (hidden, total))
