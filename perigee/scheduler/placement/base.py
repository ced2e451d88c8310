"""The interface of placement policies, and what they share."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from perigee.scheduler.events import RequestArrived
from perigee.scheduler.plan import DecodeEstimate, Plan, PrefillEstimate
from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView

# Predictions that differ by less say nothing about who is better. To always follow them would send everything to one of
# two equal workers.
NEAR = 1.05


class Placement(Protocol):
    """Chooses the workers of a request."""

    def place(self, view: ClusterView, pools: Pools, request: RequestArrived, now: float) -> Plan:
        """The plan over `pools`, which hold at least one worker for each phase."""
        ...


Estimate = TypeVar("Estimate", PrefillEstimate, DecodeEstimate)


def best(estimates: Sequence[Estimate]) -> Estimate:
    """The least recently chosen worker of those that are as good as the best. `estimates` is not empty."""
    return min(near(estimates), key=lambda estimate: (estimate.worker.last_chosen, estimate.worker.id))


def near(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Those as good as the best."""
    limit_s = NEAR * min(estimate.seconds for estimate in estimates)
    return [estimate for estimate in estimates if estimate.seconds <= limit_s]
