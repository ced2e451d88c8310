"""Admission by forecast: the default.

At arrival it asks what the planned decode worker will have to do when this prompt will be computed, and in the seconds
after that: of the requests that decode now, each will have ended with a probability that its age and the lengths of
earlier answers give; the prompts in flight arrive when they are predicted to. As that counts what is on its way, the
lag between letting in and the load that comes of it, which makes early rejection swing, is part of the forecast; and as
each answer has its own distribution instead of one duration for all, departures are spread as they really are.
"""

import math

import numpy as np

from perigee.scheduler.admission.base import (
    Floats,
    Refusal,
    decode_loads,
    first_token_at,
    full,
    late,
)
from perigee.scheduler.admission.headroom import Headroom
from perigee.scheduler.admission.margin import Margin
from perigee.scheduler.admission.retry import Promises, drained_s
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.ids import RequestKey
from perigee.scheduler.plan import Plan
from perigee.scheduler.view import ClusterView, InFlight
from perigee.scheduler.worker_view import Demand, WorkerView

# The load is looked at for so many seconds after the first token, and for longer if prompts that were let in before
# will be computed after this one; at some moments.
_WINDOW_S = 4.0
_MOMENTS = np.array([0.0, 0.2, 0.4, 0.7, 1.0])

# What is aimed at, of a promised TBT: contexts grow, and steps are not all alike.
_AIM = 0.97

# TBT is to hold with so many more of a request's size: so that where room is short, the long are refused before the
# short. For one of them several others are served.
_SIZES = 1.5


class Foresight:
    """Where a TBT is promised, to the request or to others on the worker, room is what the forecast says; elsewhere it
    is what nobody has booked, so that what is let in never waits for it.
    """

    def __init__(self) -> None:
        self._headroom = Headroom()
        self._promises = Promises()
        self._margin = Margin()

    def admit(self, view: ClusterView, request: RequestArrived, plan: Plan, now: float) -> Refusal | None:
        key = RequestKey.of(request.server, request.ref)
        self._promises.keep(key)
        self._headroom.asked(request.priority, now)
        limit = self._headroom.limit(request.priority, view.shares.is_above(request.tenant, now), now)
        refusal = self._late(view, request, plan, limit, now) or self._crowded(view, request, plan, limit, now)
        if refusal is not None:
            self._promises.make(key, now + refusal.retry_after_s, request.priority)
        return refusal

    def proceed(self, view: ClusterView, request: InFlight, now: float) -> Refusal | None:
        """Refuses if that saves more work than it throws away: what the prompts of others took whose promised TBT would
        not be kept in the next seconds with this sequence in the batch, against what its own took, which is lost in any
        case if its own TBT would not be kept either.
        """
        worker = view.workers[request.decode]
        load = view.forecast.load(worker, now + _WINDOW_S * _MOMENTS, now)
        step_s = float(worker.cost.step_s(load.batch, load.context_tokens).mean()) / _AIM
        tightest_s = view.forecast.tightest_tbt_s(worker)
        if not math.isinf(tightest_s):
            self._margin.observe(step_s > tightest_s)
        broken_s = view.forecast.broken_work_s(worker, step_s)
        own_s = request.work_s
        saved_s, lost_s = (broken_s - own_s, 0.0) if request.slo.tbt_s < step_s else (broken_s, own_s)
        if saved_s <= lost_s:
            return None
        return full(drained_s(view, worker, request.demand, request.slo.tbt_s, now))

    def _late(self, view: ClusterView, request: RequestArrived, plan: Plan, limit: float, now: float) -> Refusal | None:
        late_s = plan.ttft_s - request.slo.ttft_s * limit
        if late_s <= 0:
            return None
        ahead = float(self._promises.before(np.array([math.inf]), request.priority, now)[0])
        queued_s = ahead * plan.prefill.compute_s / len(view.workers)
        return late(plan, request.slo, late_s + queued_s)

    def _crowded(
        self, view: ClusterView, request: RequestArrived, plan: Plan, limit: float, now: float
    ) -> Refusal | None:
        demand, worker = view.demand(request), plan.decode.worker
        tbt_s = min(request.slo.tbt_s, view.forecast.tightest_tbt_s(worker))
        if math.isinf(tbt_s):
            load = _booked(worker, demand)
        else:
            load = self._foreseen(view, request, plan, tbt_s, now)
        if load <= limit or (load <= 1.0 and not worker.load.sequences):  # an idle worker is for everyone
            return None
        return full(drained_s(view, worker, demand, tbt_s, now, limit, self._promises, request.priority))

    def _foreseen(self, view: ClusterView, request: RequestArrived, plan: Plan, tbt_s: float, now: float) -> float:
        """The highest load with this request from its first token on."""
        worker = plan.decode.worker
        at = max(now, first_token_at(request, plan, now))
        load = view.forecast.load(worker, _moments(view, worker, at), now)
        margin = (_SIZES + self._margin.deviations * np.sqrt(load.variance + 1.0)) * bool(worker.load.sequences)
        return float(decode_loads(worker, load, view.demand(request), _AIM * tbt_s, margin=margin).max())


def _booked(worker: WorkerView, demand: Demand) -> float:
    """The part of places or pages that is taken with this request, counting what all may come to at the most."""
    report, load = worker.report, worker.load
    assert report is not None
    return max((load.sequences + 1) / report.max_sequences, (load.pages + demand.pages) / report.total_pages)


def _moments(view: ClusterView, worker: WorkerView, at: float) -> Floats:
    """When to look at the load if a request joins then."""
    last = view.forecast.last_start(worker)
    return at + max(_WINDOW_S, last - at) * _MOMENTS
