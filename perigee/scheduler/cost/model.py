"""How long a worker takes: a linear profile, and for each worker how far from it reality has been.

Seconds throughout. The profile is what was measured before; corrections come from what the workers report.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from perigee.scheduler.cost.corrections import Correction, Handling, Line

Quantity = TypeVar("Quantity", float, NDArray[np.float64])

# What was learned of a worker that shows nothing new is half forgotten after this long: were it kept, a worker that was
# slow once would get no work, and so no chance to show that it is not slow.
HALF_LIFE_S = 30.0


@dataclass(frozen=True, slots=True)
class CostProfile:
    """Coefficients of the linear models. The defaults suit a small model on a few CPU cores.

    Each method takes numbers, or arrays of one shape for as many predictions at once.
    """

    prefill_fixed_s: float = 5e-3
    prefill_token_s: float = 5e-4
    prefill_pair_s: float = 1e-8  # one new token attending to one earlier token
    load_fixed_s: float = 0.0  # leases and slots for a prompt's blocks
    load_token_s: float = 2e-6  # out of the local store into the worker's pages
    promote_token_s: float = 1e-5  # out of the SSD of a store node into its memory
    transfer_fixed_s: float = 2e-3  # to begin to pull blocks from another store node
    transfer_token_s: float = 2e-5  # out of another store node into the local one
    step_fixed_s: float = 1e-2
    step_sequence_s: float = 1e-3
    step_context_token_s: float = 1e-6
    # A mixture of experts: reading all of them, and the chance that a sequence needs a given one. A small batch reads
    # few of them, a large one all.
    step_experts_s: float = 0.0
    step_expert_share: float = 0.0

    def prefill_s(self, new_tokens: Quantity, prefix_tokens: Quantity) -> Quantity:
        """Computing `new_tokens` after `prefix_tokens` that are there already."""
        pairs = new_tokens * (prefix_tokens + new_tokens / 2)
        return self.prefill_fixed_s + self.prefill_token_s * new_tokens + self.prefill_pair_s * pairs

    def load_s(self, tokens: Quantity) -> Quantity:
        """Taking over cached tokens, if any, from the local store."""
        return self.load_fixed_s + self.load_token_s * tokens

    def promote_s(self, tokens: Quantity) -> Quantity:
        """Reading cached tokens from a store node's SSD, before they are loaded or sent."""
        return self.promote_token_s * tokens

    def transfer_s(self, tokens: Quantity) -> Quantity:
        """Pulling cached tokens from another store node, before they are loaded."""
        return self.transfer_fixed_s + self.transfer_token_s * tokens

    def step_s(self, batch: Quantity, context_tokens: Quantity) -> Quantity:
        """One decode step of `batch` sequences that hold `context_tokens` together."""
        unread: Quantity = (1.0 - self.step_expert_share) ** batch
        return self.step_fixed_s + self.step_experts_s * (1.0 - unread) + self._decoding_s(batch, context_tokens)

    def mixed_s(
        self, new_tokens: Quantity, prefix_tokens: Quantity, batch: Quantity, context_tokens: Quantity
    ) -> Quantity:
        """One step that computes a part of a prompt and decodes a batch. The prompt's part reads all weights."""
        return self.prefill_s(new_tokens, prefix_tokens) + self._decoding_s(batch, context_tokens)

    def context_s(self, tokens: Quantity) -> Quantity:
        """What so much more context adds to a decode step, however much there is."""
        return self.step_context_token_s * tokens

    def _decoding_s(self, batch: Quantity, context_tokens: Quantity) -> Quantity:
        """What a batch adds to a step that has read the weights."""
        return self.step_sequence_s * batch + self.context_s(context_tokens)


@dataclass(slots=True)
class WorkerCost:
    """The profile, corrected for one worker."""

    profile: CostProfile
    prefill: Line = field(default_factory=Line)
    load: Correction = field(default_factory=Correction)
    step: Correction = field(default_factory=Correction)
    _last_token_at: float = -math.inf

    def prefill_s(self, new_tokens: Quantity, prefix_tokens: Quantity) -> Quantity:
        return self.prefill.factor * self.profile.prefill_s(new_tokens, prefix_tokens) + self.prefill.offset_s

    def load_s(self, tokens: Quantity) -> Quantity:
        return self.load.factor * self.profile.load_s(tokens)

    def transfer_s(self, tokens: Quantity) -> Quantity:
        return self.profile.transfer_s(tokens)

    def step_s(self, batch: Quantity, context_tokens: Quantity) -> Quantity:
        return self.step.factor * self.profile.step_s(batch, context_tokens)

    def observe_prefill(self, new_tokens: int, prefix_tokens: int, compute_s: float) -> None:
        """The worker was busy with this prompt for so long, beside what it did for others."""
        self.prefill.observe(self.profile.prefill_s(new_tokens, prefix_tokens), compute_s)

    def observe_load(self, tokens: int, load_s: float) -> None:
        """Taking over cached tokens took this long."""
        self.load.observe(self.profile.load_s(tokens), load_s)

    def observe_step(self, batch: int, context_tokens: int, step_s: float) -> None:
        """A decode step took this long."""
        self.step.observe(self.profile.step_s(batch, context_tokens), step_s)

    def own_part_s(self, compute_s: float, now: float) -> float:
        """Of the time in which a prompt was computed that ends now, what is not counted to the one before it: prompts
        that share a step end together, and each says that it took the whole step."""
        own_s = min(compute_s, now - self._last_token_at)
        self._last_token_at = now
        return max(0.0, own_s)

    def relax(self, typical: "WorkerCost", kept: float) -> None:
        """Forgets a part of what was learned of what the worker has not done lately."""
        self.prefill.relax(typical.prefill, kept)
        self.load.relax(typical.load.factor, kept)
        self.step.relax(typical.step.factor, kept)


class CostModel:
    """Hands each worker its WorkerCost. A new worker starts as slow as the others have been on average: were it to
    start from the bare profile, it would be shunned or flooded for as long as that is wrong.
    """

    def __init__(self, profile: CostProfile) -> None:
        self.handling = Handling()
        self._profile = profile
        self._typical = WorkerCost(profile)
        self._relaxed_at: float | None = None

    def new_worker(self) -> WorkerCost:
        typical = self._typical
        return WorkerCost(
            self._profile,
            prefill=Line(typical.prefill.factor, typical.prefill.offset_s),
            load=Correction(typical.load.factor),
            step=Correction(typical.step.factor),
        )

    def observe_prefill(
        self, cost: WorkerCost, now: float, *, new_tokens: int, prefix_tokens: int, load_s: float, compute_s: float
    ) -> None:
        """A worker's prefill took this long, until now. What is 0 was not measured, and teaches nothing."""
        own_s = cost.own_part_s(compute_s, now)
        for each in (cost, self._typical):
            if compute_s > 0:
                each.observe_prefill(new_tokens, prefix_tokens, own_s)
            if load_s > 0:
                each.observe_load(prefix_tokens, load_s)

    def observe_step(self, cost: WorkerCost, *, batch: int, context_tokens: int, step_s: float) -> None:
        """A worker's decode step took this long. What is 0 was not measured, and teaches nothing."""
        for each in (cost, self._typical) if step_s > 0 else ():
            each.observe_step(batch, context_tokens, step_s)

    def relax(self, costs: Iterable[WorkerCost], now: float) -> None:
        """Lets what was learned of idle workers fade towards what is typical. To be called about every second."""
        elapsed_s = now - self._relaxed_at if self._relaxed_at is not None else 0.0
        self._relaxed_at = now
        kept = 0.5 ** (elapsed_s / HALF_LIFE_S)
        for cost in costs:
            cost.relax(self._typical, kept)
