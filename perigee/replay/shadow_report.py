"""What a shadow would have done with the requests of a run, beside what was done with them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from perigee.replay.metrics import Distribution, distribution
from perigee.scheduler.policies import PolicyNames
from perigee.scheduler.shadow import Decision, Tally

Judged = tuple[Decision, Decision]
"""Of one arrival: the acting policies' decision, and what the shadow's would have been."""


@dataclass(frozen=True, slots=True)
class SecondChecks:
    """Prompts that were computed, and of these what the shadow alone would have turned away, or let go on."""

    checks: int = 0
    rejections_made: int = 0
    rejections_avoided: int = 0

    @classmethod
    def of(cls, tally: Tally) -> "SecondChecks":
        return cls(tally.second_checks, tally.second_rejections_made, tally.second_rejections_avoided)

    def since(self, earlier: "SecondChecks") -> "SecondChecks":
        return SecondChecks(
            self.checks - earlier.checks,
            self.rejections_made - earlier.rejections_made,
            self.rejections_avoided - earlier.rejections_avoided,
        )


@dataclass(frozen=True, slots=True)
class Side:
    """One set of policies: what it serves, and what it expects, in seconds, of the requests that both sides serve."""

    placement: str
    admission: str
    served: int
    rejected: int
    ttft_s: Distribution
    tbt_s: Distribution


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """Each decision is compared by itself: it is about the cluster as the acting policies made it. A request that was
    tried again counts as often. `placed_elsewhere` are those of `both_served` with another worker for either phase.
    """

    decisions: int
    acting: Side
    shadow: Side
    both_served: int
    placed_elsewhere: int
    other_prefill: int
    other_decode: int
    both_rejected: int
    rejections_made: int
    rejections_avoided: int
    second: SecondChecks


def compare(
    acting: PolicyNames, shadow: PolicyNames, judged: Sequence[Judged], second: SecondChecks = SecondChecks()
) -> ShadowReport:
    """The report over `judged`, in any order."""
    both = [(ours, theirs) for ours, theirs in judged if not ours.rejected and not theirs.rejected]
    return ShadowReport(
        decisions=len(judged),
        acting=_side(acting, [ours for ours, _ in judged], [ours for ours, _ in both]),
        shadow=_side(shadow, [theirs for _, theirs in judged], [theirs for _, theirs in both]),
        both_served=len(both),
        placed_elsewhere=sum(_workers(ours) != _workers(theirs) for ours, theirs in both),
        other_prefill=sum(ours.prefill != theirs.prefill for ours, theirs in both),
        other_decode=sum(ours.decode != theirs.decode for ours, theirs in both),
        both_rejected=sum(ours.rejected and theirs.rejected for ours, theirs in judged),
        rejections_made=sum(theirs.rejected and not ours.rejected for ours, theirs in judged),
        rejections_avoided=sum(ours.rejected and not theirs.rejected for ours, theirs in judged),
        second=second,
    )


def side_by_side(report: ShadowReport) -> Iterator[tuple[str, str, str]]:
    """Rows for people: what, the acting policies', the shadow's."""
    acting, shadow = report.acting, report.shadow
    yield "placement", acting.placement, shadow.placement
    yield "admission", acting.admission, shadow.admission
    yield "served", f"{acting.served:,}", f"{shadow.served:,}"
    yield "rejected at arrival", f"{acting.rejected:,}", f"{shadow.rejected:,}"
    for name, ours, theirs in (("TTFT", acting.ttft_s, shadow.ttft_s), ("TBT", acting.tbt_s, shadow.tbt_s)):
        yield f"predicted {name}, mean", _ms(ours.mean), _ms(theirs.mean)
        yield f"predicted {name}, p90", _ms(ours.p90), _ms(theirs.p90)


def differences(report: ShadowReport) -> Iterator[tuple[str, str]]:
    """Rows for people: in how many decisions, of how many, the shadow would have done what else."""
    both, second = report.both_served, report.second
    yield "placed elsewhere", _of(report.placed_elsewhere, both)
    yield "  on another prefill worker", _of(report.other_prefill, both)
    yield "  on another decode worker", _of(report.other_decode, both)
    yield "rejected what was served", _of(report.rejections_made, report.acting.served)
    yield "served what was rejected", _of(report.rejections_avoided, report.acting.rejected)
    yield "rejected after prefill what went on", _of(second.rejections_made, second.checks)
    yield "let go on what was rejected after prefill", _of(second.rejections_avoided, second.checks)


def _side(names: PolicyNames, every: Sequence[Decision], served_by_both: Sequence[Decision]) -> Side:
    rejected = sum(decision.rejected for decision in every)
    return Side(
        names.placement,
        names.admission,
        served=len(every) - rejected,
        rejected=rejected,
        ttft_s=distribution(decision.ttft_s for decision in served_by_both),
        tbt_s=distribution(decision.tbt_s for decision in served_by_both),
    )


def _workers(decision: Decision) -> tuple[str, str]:
    return decision.prefill, decision.decode


def _of(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})" if whole else "0 of 0"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:,.1f} ms"
