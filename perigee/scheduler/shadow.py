"""A second set of policies that is asked about each request and obeyed about none.

It sees what the acting policies see, at the same moment, and keeps no books: what it would have done to the cluster
after that, nobody knows. So each of its decisions is compared by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

from perigee.scheduler.admission import Refusal
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.plan import Plan
from perigee.scheduler.policies import Policies
from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView, InFlight


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the shadow would have done with an arrival: gone by `plan`, unless there is a `refusal`."""

    plan: Plan
    refusal: Refusal | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What was, or would have been, done with an arrival. Times are as predicted for these two workers, whether or not
    it is `rejected`.
    """

    prefill: str
    decode: str
    ttft_s: float
    tbt_s: float
    rejected: bool

    @classmethod
    def of(cls, plan: Plan, refusal: Refusal | None) -> "Decision":
        prefill, decode = plan.workers
        return cls(prefill, decode, plan.ttft_s, plan.tbt_s, refusal is not None)


@dataclass(slots=True)
class Tally:
    """How the shadow's decisions compare with ours. The Shadow alone adds to it.

    "Made" rejections are the shadow's where we served, "avoided" ones are ours where it would have served.
    """

    arrivals: int = 0
    both_dispatched: int = 0
    both_rejected: int = 0
    rejections_made: int = 0
    rejections_avoided: int = 0
    same_prefill: int = 0  # of those that both dispatched, as the next three
    same_decode: int = 0
    same_workers: int = 0
    ttft_difference_s: float = 0.0  # the sum of the shadow's prediction minus ours
    second_checks: int = 0  # prompts that were computed
    second_rejections_made: int = 0
    second_rejections_avoided: int = 0

    @property
    def agreement(self) -> float:
        """The share of arrivals with which both would have done the same: both workers, or a rejection."""
        return (self.same_workers + self.both_rejected) / self.arrivals if self.arrivals else 1.0

    @property
    def mean_ttft_difference_s(self) -> float:
        """How much later (or, below zero, earlier) the shadow expects the first token of what both dispatch."""
        return self.ttft_difference_s / self.both_dispatched if self.both_dispatched else 0.0


class Shadow:
    """`policies` must be its own: they may keep state. `on_judged` is told of each decision about an arrival: ours, and
    what the shadow's would have been.
    """

    def __init__(self, policies: Policies, on_judged: Callable[[Decision, Decision], None] | None = None) -> None:
        self.policies = policies
        self.tally = Tally()
        self._on_judged = on_judged

    def judge(
        self, view: ClusterView, pools: Pools, request: RequestArrived, ours: Plan, refusal: Refusal | None, now: float
    ) -> Verdict:
        """Its own decision about what was just decided as `ours` and `refusal`, and is not on the books yet."""
        plan, theirs = self.policies.plan(view, pools, request, now)
        verdict = Verdict(plan, theirs)
        self._count(verdict, ours, refusal)
        if self._on_judged:
            self._on_judged(Decision.of(ours, refusal), Decision.of(plan, verdict.refusal))
        return verdict

    def judge_again(self, view: ClusterView, request: InFlight, refusal: Refusal | None, now: float) -> None:
        """Counts what it would have decided about a request whose prompt is computed, where ours was `refusal`."""
        verdict = self.policies.admission.proceed(view, request, now)
        self.tally.second_checks += 1
        self.tally.second_rejections_made += verdict is not None and refusal is None
        self.tally.second_rejections_avoided += verdict is None and refusal is not None

    def _count(self, verdict: Verdict, ours: Plan, refusal: Refusal | None) -> None:
        tally = self.tally
        tally.arrivals += 1
        tally.both_rejected += verdict.refusal is not None and refusal is not None
        tally.rejections_made += verdict.refusal is not None and refusal is None
        tally.rejections_avoided += verdict.refusal is None and refusal is not None
        if verdict.refusal is None and refusal is None:
            self._compare(verdict.plan, ours)

    def _compare(self, plan: Plan, ours: Plan) -> None:
        tally = self.tally
        tally.both_dispatched += 1
        tally.same_prefill += plan.workers[0] == ours.workers[0]
        tally.same_decode += plan.workers[1] == ours.workers[1]
        tally.same_workers += plan.workers == ours.workers
        tally.ttft_difference_s += plan.ttft_s - ours.ttft_s
