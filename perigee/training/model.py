"""A model in training: its weights as a checkpoint names them, in float32, and the decoder that computes with them."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perigee.training.mimetic import mimic
from perigee.workers.model.moonlight_config import MoonlightConfig
from perigee.workers.model.trainable import TrainableModel

# Of all matrices and tables, as DeepSeek-V3 begins with.
INITIAL_STD = 0.02


class TrainedModel:
    """`weights` holds each tensor of a Hugging Face checkpoint, by its name: those are what optimizers move.

    The decoder stacks several of them in one parameter, in the dtype that it computes in; it gets a copy of them before
    each step, and its gradients are handed back to them after. So Muon orthogonalises what a checkpoint calls a matrix:
    queries apart from latents, gate apart from up, each expert for itself.
    """

    def __init__(
        self, config: Mapping[str, Any], dtype: Literal["float32", "bfloat16"], seed: int, *, mimetic: bool = False
    ) -> None:
        """`config` is a config.json; `mimetic` says whether attention begins as `mimic` has it.

        Raises UnsupportedModel for one that is not of Moonlight's architecture.
        """
        self.decoder = TrainableModel(MoonlightConfig.from_json(config), dtype)
        self._places = self.decoder.places()
        generator = torch.Generator().manual_seed(seed)
        self.weights = {name: _initial(name, place.shape, generator) for name, (place, _) in self._places.items()}
        if mimetic:
            mimic(self.weights, self.decoder.config, generator)

    @property
    def trained(self) -> dict[str, Tensor]:
        """The weights that gradients move."""
        return {name: weight for name, weight in self.weights.items() if weight.requires_grad}

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the weights to the decoder, which forgets its gradients."""
        for name, (place, owner) in self._places.items():
            place.view.copy_(self.weights[name].view(place.view.shape))
            owner.grad = None

    @torch.no_grad()
    def collect(self) -> None:
        """Hands the decoder's gradients to the weights."""
        for name, weight in self.trained.items():
            place, owner = self._places[name]
            assert owner.grad is not None
            view = place.view
            gradient = owner.grad.as_strided(view.shape, view.stride(), view.storage_offset())
            weight.grad = gradient.reshape(weight.shape).float()

    def loss(self, tokens: Tensor, weights: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """The mean cross-entropy, in nats, of each of `tokens` [sequences, length + 1] but the first, given those
        before.

        `weights` [sequences, length] says what each counts, in equal parts if not given; `positions` as of
        `TrainableModel`.
        """
        logits = self.decoder(tokens[:, :-1], positions).flatten(0, 1).float()
        if weights is None:
            return F.cross_entropy(logits, tokens[:, 1:].flatten())
        losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        return losses @ weights.flatten() / weights.sum()


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("e_score_correction_bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return nn.Parameter(torch.ones(shape))
    return nn.Parameter(torch.empty(shape).normal_(std=INITIAL_STD, generator=generator))
