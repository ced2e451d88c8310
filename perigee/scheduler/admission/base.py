"""The interface of admission policies, and what they share."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from perigee.scheduler.commands import RejectReason
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.outlook import Load
from perigee.scheduler.plan import Plan
from perigee.scheduler.slo import Slo
from perigee.scheduler.view import ClusterView, InFlight
from perigee.scheduler.worker_view import DecodeLoad, Demand, WorkerView

Floats = NDArray[np.float64]

# Of the expected number of sequences so much is none: one that is as likely as not to have ended makes room.
_ROUNDING = 0.5

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not, and when trying again may help (0: never).

    `for_others`: others on the planned decode worker were promised a stricter TBT. Where nobody was, there may be room.
    """

    reason: RejectReason
    message: str
    retry_after_s: float = 0.0
    for_others: bool = False


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


def overloaded(message: str, retry_after_s: float, for_others: bool = False) -> Refusal:
    return Refusal(RejectReason.OVERLOAD, message, within_bounds(retry_after_s), for_others)


def late(plan: Plan, slo: Slo, retry_after_s: float) -> Refusal:
    """Refuses for what would be a TTFT that is too long."""
    message = f"the first token is predicted after {plan.ttft_s:.2f} s, promised within {slo.ttft_s:g} s"
    return overloaded(message, retry_after_s)


def full(retry_after_s: float, for_others: bool = False) -> Refusal:
    """Refuses for want of room."""
    return overloaded("all decode workers are full", retry_after_s, for_others)


def first_token_at(request: RequestArrived, plan: Plan, now: float) -> float:
    """When the prompt is predicted to be computed."""
    return now + plan.ttft_s - request.age_s


def decode_loads(
    worker: WorkerView,
    load: Load,
    demand: Demand,
    tbt_s: float,
    more: float | Floats = 1.0,
    margin: float | Floats = 0.0,
) -> Floats:
    """A decode worker's load with `more` sequences of this demand: 1 where it has no place or no page to spare, or
    where TBT, with `margin` further ones in the batch, is at its bound of `tbt_s`.

    Half a place counts as none: to round what are expected values.
    """
    report = worker.report
    assert report is not None
    places = (load.places + more - _ROUNDING) / report.max_sequences
    pages = (load.pages + more * demand.pages) / report.total_pages
    joining = more + margin
    step_s = worker.cost.step_s(load.batch + joining, load.context_tokens + joining * demand.num_tokens)
    return np.maximum(np.maximum(places, pages), step_s / tbt_s)


def most_load(
    worker: WorkerView, load: DecodeLoad, demand: Demand, tbt_s: float, more: float = 1.0, margin: float = 0.0
) -> float:
    """What `decode_loads` says, of one load in whole sequences: plain numbers, since each arrival asks for it."""
    report = worker.report
    assert report is not None
    joining = more + margin
    step_s = worker.cost.step_s(load.sequences + joining, load.context_tokens + joining * demand.num_tokens)
    return max(
        (load.sequences + more - _ROUNDING) / report.max_sequences,
        (load.pages + more * demand.pages) / report.total_pages,
        step_s / tbt_s,
    )
