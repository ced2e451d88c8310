"""What share of AdamW's steps Muon needs to come to the same held-out loss."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from perigee.training.curve import Curve
from perigee.training.recipe import OptimizerName, Recipe

OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "muon")

# "Muon is Scalable for LLM Training", 3.2: of the FLOPs, by scaling laws fitted to models of 0.4 to 1.5 billion
# weights.
PAPERS_SHARE = 0.52


@dataclass(frozen=True, slots=True)
class SeedResult:
    """Of one seed: AdamW's run, and Muon's by their numbers of steps, each with a schedule of its own."""

    seed: int
    adamw: Curve
    muon: Mapping[int, Curve]

    @property
    def share(self) -> float | None:
        """The share of AdamW's steps after which a Muon run whose schedule ends there has AdamW's final loss.

        On a line between runs. The shortest run's share, if that one is better already; None if even the longest is not
        as good.
        """
        finals = Curve(held_out={steps: curve.final for steps, curve in self.muon.items()})
        return self._share_of(finals.first_reaching(self.adamw.final))

    @property
    def share_is_bound(self) -> bool:
        """Whether `share` is that of the shortest run, which was better already: so the true share is lower."""
        return self.muon[min(self.muon)].final < self.adamw.final

    @property
    def share_on_curve(self) -> float | None:
        """The share after which the longest Muon run was as good, in the middle of its schedule: an upper bound."""
        return self._share_of(self.muon[max(self.muon)].first_reaching(self.adamw.final))

    def _share_of(self, steps: float | None) -> float | None:
        return None if steps is None else steps / max(self.adamw.held_out)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that was measured. `tuning` holds final losses by optimizer and learning rate."""

    recipe: Recipe
    tuning: Mapping[str, Mapping[float, float]]
    seeds: Sequence[SeedResult]

    def as_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.as_json(),
            "tuning": {name: {str(lr): loss for lr, loss in losses.items()} for name, losses in self.tuning.items()},
            "tuned_lr": {name: best_lr(losses) for name, losses in self.tuning.items()},
            "share": _summary([result.share for result in self.seeds]),
            "share_is_bound": [result.share_is_bound for result in self.seeds],
            "share_on_curve": _summary([result.share_on_curve for result in self.seeds]),
            "paper_share": PAPERS_SHARE,
            "seeds": [_seed_json(result) for result in self.seeds],
        }


def best_lr(losses: Mapping[float, float]) -> float:
    """The learning rate of the least loss."""
    return min(losses, key=lambda lr: losses[lr])


def step_counts(steps: int, shares: Sequence[float]) -> Iterator[int]:
    """Of Muon's runs, rising."""
    yield from sorted({max(1, round(steps * share)) for share in shares})


def _summary(shares: Sequence[float | None]) -> dict[str, Any]:
    """Over the seeds that have a share."""
    found = [share for share in shares if share is not None]
    return {
        "per_seed": [None if share is None else round(share, 4) for share in shares],
        "mean": round(mean(found), 4) if found else None,
        "stdev": round(stdev(found), 4) if len(found) > 1 else None,
    }


def _seed_json(result: SeedResult) -> dict[str, Any]:
    return {
        "seed": result.seed,
        "adamw": {"final": round(result.adamw.final, 5), **result.adamw.as_json()},
        "muon": {
            str(steps): {"final": round(curve.final, 5), **curve.as_json()} for steps, curve in result.muon.items()
        },
    }
