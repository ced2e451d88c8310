"""From measurements to a cost profile: least squares with no negative coefficient, of relative errors, robustly.

Relative, because a prompt of 100 tokens is to be predicted as well as one of 100,000. Robust (Huber's weights, by
iteration), because on a machine that does other things some measurements are far too slow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

from perigee.scheduler.cost import CostProfile
from perigee.scheduler.errors import InvalidProfile

Array = NDArray[np.float64]

# Residuals beyond this many deviations count linearly instead of squared, which for normal ones costs 5% of precision.
_HUBER = 1.345
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_ITERATIONS = 30

# Chances that a sequence needs a given expert which are tried. One counts as seen if the fit is that much better.
_EXPERT_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
_CLEARLY_BETTER = 0.7


@dataclass(frozen=True, slots=True)
class PrefillSample:
    """A worker computed `new_tokens` after `prefix_tokens` that were cached, all alone."""

    new_tokens: int
    prefix_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class MoveSample:
    """So many cached tokens, or none, were loaded from the local store, or pulled from another one."""

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepSample:
    """A decode step of `batch` sequences that held `context_tokens` together, from token to token."""

    batch: int
    context_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Samples:
    """All that was measured. `pulls` are measured without the loading that follows; there may be none."""

    prefills: Sequence[PrefillSample]
    loads: Sequence[MoveSample]
    pulls: Sequence[MoveSample]
    steps: Sequence[StepSample]


@dataclass(frozen=True, slots=True)
class Residual:
    """Of one fit: |predicted - measured| / measured over its samples."""

    samples: int
    p50: float
    p90: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """A profile, and by the name of each part how far its samples are from it. What was not measured is in neither:
    its coefficients are those of `fit`'s `base`.
    """

    profile: CostProfile
    residuals: dict[str, Residual]


@dataclass(frozen=True, slots=True)
class _Line:
    """Non-negative coefficients of the columns of one design, and what they cost."""

    coefficients: Array
    residual: Residual
    loss: float


def fit(samples: Samples, base: CostProfile) -> Fitted:
    """The profile that suits the samples. Raises InvalidProfile where there are too few of a kind that there is."""
    profile, residuals = base, {}
    for name, part in (
        ("prefill", _fit_prefill(samples.prefills)),
        ("load", _fit_moves("loads", "load", samples.loads)),
        ("transfer", _fit_moves("pulls", "transfer", samples.pulls)),
        ("step", _fit_step(samples.steps)),
    ):
        if part is not None:
            changes, residuals[name] = part
            profile = replace(profile, **changes)
    return Fitted(profile, residuals)


_Part = tuple[dict[str, float], Residual] | None


def _fit_prefill(samples: Sequence[PrefillSample]) -> _Part:
    new = np.array([sample.new_tokens for sample in samples], float)
    prefix = np.array([sample.prefix_tokens for sample in samples], float)
    design = np.stack([np.ones_like(new), new, new * (prefix + new / 2)], axis=1)
    return _named(("prefill_fixed_s", "prefill_token_s", "prefill_pair_s"), _line("prefills", design, samples))


def _fit_moves(name: str, part: str, samples: Sequence[MoveSample]) -> _Part:
    """The coefficients of `part`, something fixed and something for each token."""
    tokens = np.array([sample.tokens for sample in samples], float)
    design = np.stack([np.ones_like(tokens), tokens], axis=1)
    return _named((f"{part}_fixed_s", f"{part}_token_s"), _line(name, design, samples))


def _fit_step(samples: Sequence[StepSample]) -> _Part:
    """With the experts' part only where a mixture of experts shows itself: small batches are faster than on a line."""
    batch = np.array([sample.batch for sample in samples], float)
    context = np.array([sample.context_tokens for sample in samples], float)
    plain = np.stack([np.ones_like(batch), batch, context], axis=1)
    line, best_share = _line("steps", plain, samples), 0.0
    names = ("step_fixed_s", "step_sequence_s", "step_context_token_s", "step_experts_s")
    if line is None:
        return None
    enough = _CLEARLY_BETTER * line.loss
    for share in _EXPERT_SHARES if len(set(batch)) > 3 else ():
        curved = _line("steps", np.column_stack([plain, 1 - (1 - share) ** batch]), samples)
        if curved is not None and curved.loss < min(enough, line.loss):
            line, best_share = curved, share
    coefficients = {"step_experts_s": 0.0, **dict(zip(names, line.coefficients.tolist(), strict=False))}
    return {**coefficients, "step_expert_share": best_share}, line.residual


def _named(names: tuple[str, ...], line: _Line | None) -> _Part:
    return None if line is None else (dict(zip(names, line.coefficients.tolist(), strict=True)), line.residual)


def _line(
    name: str, design: Array, samples: Sequence[PrefillSample] | Sequence[MoveSample] | Sequence[StepSample]
) -> _Line | None:
    """The fit of `design` [samples, columns] to the samples' times; None if there are none.

    Raises InvalidProfile if there are fewer than columns.
    """
    if not samples:
        return None
    if len(samples) < design.shape[1]:
        raise InvalidProfile(f"{name}: there are {len(samples)} samples, allowed are {design.shape[1]} and more")
    seconds = np.array([sample.seconds for sample in samples], float)
    scaled = design / seconds[:, None]  # so that 1 is to be predicted everywhere
    coefficients = _robust(scaled)
    errors = np.abs(scaled @ coefficients - 1)
    p50, p90 = np.quantile(errors, [0.5, 0.9]).tolist()
    return _Line(coefficients, Residual(len(samples), p50, p90), float(np.minimum(errors, 3 * p50).sum()))


def _robust(design: Array) -> Array:
    """Coefficients >= 0 with which the columns sum up to about 1 in most rows."""
    weights = np.ones(len(design))
    for _ in range(_ITERATIONS):
        coefficients = _non_negative(design * weights[:, None], weights)
        errors = np.abs(design @ coefficients - 1)
        limit = _HUBER * _MAD_TO_DEVIATION * float(np.median(errors))
        new = np.sqrt(np.minimum(1.0, limit / np.maximum(errors, 1e-12))) if limit else weights
        if np.allclose(new, weights, atol=1e-6):
            break
        weights = new
    return coefficients


def _non_negative(design: Array, targets: Array) -> Array:
    """Least squares with coefficients >= 0. A design has a few columns, so each set of those that may be above zero is
    tried: the best solution that needs no other's is the one.
    """
    scale = np.maximum(np.abs(design).max(axis=0), 1e-300)  # columns differ by many orders of magnitude
    best, best_loss = np.zeros(design.shape[1]), float(targets @ targets)
    for columns in _subsets(design.shape[1]):
        chosen = list(columns)
        solution, *_ = np.linalg.lstsq(design[:, chosen] / scale[chosen], targets, rcond=None)
        rest = design[:, chosen] / scale[chosen] @ solution - targets
        if np.all(solution >= 0) and float(rest @ rest) < best_loss:
            best = np.zeros(design.shape[1])
            best[chosen], best_loss = solution / scale[chosen], float(rest @ rest)
    return best


def _subsets(num_columns: int) -> Iterator[tuple[int, ...]]:
    sizes = range(1, num_columns + 1)
    return chain.from_iterable(combinations(range(num_columns), size) for size in sizes)
