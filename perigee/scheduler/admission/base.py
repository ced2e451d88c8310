"""The interface of admission policies."""

from dataclasses import dataclass
from typing import Protocol

from perigee.scheduler.commands import RejectReason
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.plan import Plan
from perigee.scheduler.view import ClusterView, InFlight

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not, and when trying again may help (0: never)."""

    reason: RejectReason
    message: str
    retry_after_s: float = 0.0


class Admission(Protocol):
    """Decides about requests that the cluster could serve, were it idle."""

    def admit(self, view: ClusterView, request: RequestArrived, plan: Plan, now: float) -> Refusal | None:
        """At arrival: why the request is not to be placed as planned, or None."""
        ...

    def proceed(self, view: ClusterView, request: InFlight, now: float) -> Refusal | None:
        """When its prompt is computed: why it is not to be decoded, or None."""
        ...


def within_bounds(retry_after_s: float) -> float:
    return min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, retry_after_s))
