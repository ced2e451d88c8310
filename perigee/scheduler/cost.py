"""How long a worker takes: a linear profile, and for each worker how far from it reality has been.

Seconds throughout. The profile is what was measured before; corrections come from what the workers report.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

# Weight that an earlier observation keeps when one more comes in: the last twenty or so decide.
_KEPT = 0.95

# What was learned of a worker that shows nothing new is half forgotten after this long: were it kept, a worker that was
# slow once would get no work, and so no chance to show that it is not slow.
HALF_LIFE_S = 30.0


@dataclass(frozen=True, slots=True)
class CostProfile:
    """Coefficients of the linear models. The defaults suit a small model on a few CPU cores."""

    prefill_fixed_s: float = 5e-3
    prefill_token_s: float = 5e-4
    prefill_pair_s: float = 1e-8  # one new token attending to one earlier token
    load_token_s: float = 2e-6  # out of the local store into the worker's pages
    transfer_fixed_s: float = 2e-3  # to begin to pull blocks from another store node
    transfer_token_s: float = 2e-5  # out of another store node into the local one
    step_fixed_s: float = 1e-2
    step_sequence_s: float = 1e-3
    step_context_token_s: float = 1e-6

    def prefill_s(self, new_tokens: int, prefix_tokens: int) -> float:
        """Computing `new_tokens` after `prefix_tokens` that are there already."""
        pairs = new_tokens * (prefix_tokens + new_tokens / 2)
        return self.prefill_fixed_s + self.prefill_token_s * new_tokens + self.prefill_pair_s * pairs

    def load_s(self, tokens: int) -> float:
        """Taking over cached tokens from the local store."""
        return self.load_token_s * tokens

    def transfer_s(self, tokens: int) -> float:
        """Pulling cached tokens from another store node, before they are loaded."""
        return self.transfer_fixed_s + self.transfer_token_s * tokens

    def step_s(self, batch: int, context_tokens: int) -> float:
        """One decode step of `batch` sequences that hold `context_tokens` together."""
        return self.step_fixed_s + self.step_sequence_s * batch + self.step_context_token_s * context_tokens


@dataclass(slots=True)
class Error:
    """Exponentially weighted mean of |predicted - actual| / actual."""

    mean: float = 0.0
    observations: int = 0

    def observe(self, predicted_s: float, actual_s: float) -> None:
        if actual_s <= 0:
            return
        self.observations += 1
        weight = max(1 - _KEPT, 1 / self.observations)
        self.mean += weight * (abs(predicted_s - actual_s) / actual_s - self.mean)


@dataclass(slots=True)
class Correction:
    """Actual over predicted time, as the ratio of two decaying sums: long work counts for more than short work."""

    factor: float = 1.0
    error: Error = field(default_factory=Error)  # of the corrected predictions
    _predicted_s: float = 0.0
    _actual_s: float = 0.0
    _fresh: bool = False  # observed since `relax` was last called

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """`predicted_s` is the profile's, uncorrected. What took no time teaches nothing."""
        if predicted_s <= 0 or actual_s <= 0:
            return
        self.error.observe(self.factor * predicted_s, actual_s)
        self._predicted_s = _KEPT * self._predicted_s + predicted_s
        self._actual_s = _KEPT * self._actual_s + actual_s
        self.factor = self._actual_s / self._predicted_s
        self._fresh = True

    def relax(self, typical: float, kept: float) -> None:
        """Unless there was an observation since the last call, keeps only this part of the distance from `typical`, in
        orders of magnitude, and of the weight of past observations."""
        if not self._fresh:
            self.factor = typical * (self.factor / typical) ** kept
            self._predicted_s *= kept
            self._actual_s = self.factor * self._predicted_s
        self._fresh = False


@dataclass(slots=True)
class WorkerCost:
    """The profile, corrected for one worker."""

    profile: CostProfile
    prefill: Correction = field(default_factory=Correction)
    load: Correction = field(default_factory=Correction)
    step: Correction = field(default_factory=Correction)

    def prefill_s(self, new_tokens: int, prefix_tokens: int) -> float:
        return self.prefill.factor * self.profile.prefill_s(new_tokens, prefix_tokens)

    def load_s(self, tokens: int) -> float:
        return self.load.factor * self.profile.load_s(tokens)

    def transfer_s(self, tokens: int) -> float:
        return self.profile.transfer_s(tokens)

    def step_s(self, batch: int, context_tokens: int) -> float:
        return self.step.factor * self.profile.step_s(batch, context_tokens)

    def observe_prefill(self, new_tokens: int, prefix_tokens: int, load_s: float, compute_s: float) -> None:
        """A prefill took this long."""
        self.prefill.observe(self.profile.prefill_s(new_tokens, prefix_tokens), compute_s)
        self.load.observe(self.profile.load_s(prefix_tokens), load_s)

    def observe_step(self, batch: int, context_tokens: int, step_s: float) -> None:
        """A decode step took this long."""
        self.step.observe(self.profile.step_s(batch, context_tokens), step_s)

    def relax(self, typical: "WorkerCost", kept: float) -> None:
        """Forgets a part of what was learned of what the worker has not done lately."""
        self.prefill.relax(typical.prefill.factor, kept)
        self.load.relax(typical.load.factor, kept)
        self.step.relax(typical.step.factor, kept)


class CostModel:
    """Hands each worker its WorkerCost. A new worker starts as slow as the others have been on average: were it to
    start from the bare profile, it would be shunned or flooded for as long as that is wrong.
    """

    def __init__(self, profile: CostProfile) -> None:
        self._profile = profile
        self._typical = WorkerCost(profile)
        self._relaxed_at: float | None = None

    def new_worker(self) -> WorkerCost:
        typical = self._typical
        return WorkerCost(
            self._profile,
            prefill=Correction(typical.prefill.factor),
            load=Correction(typical.load.factor),
            step=Correction(typical.step.factor),
        )

    def observe_prefill(
        self, cost: WorkerCost, *, new_tokens: int, prefix_tokens: int, load_s: float, compute_s: float
    ) -> None:
        """A worker's prefill took this long."""
        for each in (cost, self._typical):
            each.observe_prefill(new_tokens, prefix_tokens, load_s, compute_s)

    def observe_step(self, cost: WorkerCost, *, batch: int, context_tokens: int, step_s: float) -> None:
        """A worker's decode step took this long."""
        for each in (cost, self._typical):
            each.observe_step(batch, context_tokens, step_s)

    def relax(self, costs: Iterable[WorkerCost], now: float) -> None:
        """Lets what was learned of idle workers fade towards what is typical. To be called about every second."""
        elapsed_s = now - self._relaxed_at if self._relaxed_at is not None else 0.0
        self._relaxed_at = now
        kept = 0.5 ** (elapsed_s / HALF_LIFE_S)
        for cost in costs:
            cost.relax(self._typical, kept)
