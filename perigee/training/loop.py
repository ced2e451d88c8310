"""The loop: a batch, its gradients, a step of the optimizer."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from perigee.training.balance import Balance
from perigee.training.checkpoint import Checkpoint, load_latest, save
from perigee.training.curve import Curve
from perigee.training.data import Corpus
from perigee.training.model import TrainedModel
from perigee.training.muon import Muon, parameter_groups
from perigee.training.recipe import Recipe

logger = logging.getLogger(__name__)

# How often, and with how many sequences, the held-out loss is measured.
MEASUREMENTS = 20
MEASURED_SEQUENCES = 32

Progress = Callable[[int, float], None]  # is told how many steps were made, and the last one's loss


class Trainer:
    """A model, its optimizer and what became of them so far."""

    def __init__(self, recipe: Recipe, corpus: Corpus) -> None:
        self.recipe = recipe
        self.corpus = corpus
        self.model = TrainedModel(recipe.shape.config(), recipe.dtype, recipe.seed, mimetic=recipe.mimetic)
        groups = parameter_groups(self.model.trained.items(), recipe.optimizer)
        self.optimizer = Muon(groups, recipe.lr, weight_decay=recipe.weight_decay)
        self.balance = Balance(self.model)
        self.curve = Curve()

    @property
    def steps_made(self) -> int:
        return len(self.curve.training)

    def run(self, directory: Path | None = None, checkpoint_s: float = 0, progress: Progress | None = None) -> Curve:
        """Trains to the recipe's end, from the latest checkpoint in `directory` if there is one.

        Leaves one there every `checkpoint_s` seconds.
        """
        if directory and (checkpoint := load_latest(directory, self.recipe)):
            self._restore(checkpoint)
        saved_at = time.monotonic()
        while self.steps_made < self.recipe.steps:
            loss = self.step()
            if progress:
                progress(self.steps_made, loss)
            if directory and time.monotonic() - saved_at >= checkpoint_s:
                save(directory, self.recipe, self.checkpoint())
                saved_at = time.monotonic()
        return self.curve

    def step(self) -> float:
        """Makes one step and returns its batch's loss."""
        step, recipe = self.steps_made, self.recipe
        self.model.publish()
        loss = self.loss(step)
        loss.backward()  # type: ignore[no-untyped-call]  # torch declares no types for it
        self.model.collect()
        clip_grad_norm_(self.model.trained.values(), recipe.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        self.optimizer.step()
        self.curve.training.append(loss.item())
        if self._is_measured(step + 1):
            self._measure()
        self.balance.update()
        return loss.item()

    def loss(self, step: int) -> Tensor:
        """Of the step's batch."""
        recipe = self.recipe
        return self.model.loss(self.corpus.batch(recipe.seed, step, recipe.sequences, recipe.shape.context))

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Of the weights as they are."""
        self.model.publish()
        batch = self.corpus.measured(MEASURED_SEQUENCES, self.recipe.shape.context)
        parts = torch.split(batch, self.recipe.sequences)
        return sum(self.model.loss(part).item() * len(part) for part in parts) / len(batch)

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.model.weights, self.optimizer.state_dict()["state"], self.curve)

    def _measure(self) -> None:
        loss, made = self.held_out_loss(), self.steps_made
        self.curve.held_out[made] = loss
        logger.debug("measured step=%d held_out=%.4f imbalance=%.2f", made, loss, self.balance.imbalance())

    def _is_measured(self, steps_made: int) -> bool:
        return steps_made % max(1, self.recipe.steps // MEASUREMENTS) == 0 or steps_made == self.recipe.steps

    @torch.no_grad()
    def _restore(self, checkpoint: Checkpoint) -> None:
        for name, weight in self.model.weights.items():
            weight.copy_(checkpoint.weights[name])
        packed = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**packed, "state": checkpoint.optimizer})
        self.curve = checkpoint.curve
