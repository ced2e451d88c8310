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
    most_load,
)
from perigee.scheduler.admission.headroom import Headroom
from perigee.scheduler.admission.margin import Margin
from perigee.scheduler.admission.retry import Promises, Wish, drained_s
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.ids import RequestKey
from perigee.scheduler.plan import Plan
from perigee.scheduler.view import ClusterView, InFlight
from perigee.scheduler.worker_view import Demand, WorkerView

# The load is looked at for so many seconds after the first token, and for longer if prompts that were let in before
# will be computed after this one; at some moments.
_WINDOW_S = 4.0
_MOMENTS = np.array([0.0, 0.2, 0.4, 0.7, 1.0])

# What is aimed at, of a promised TBT: contexts grow while others do not leave yet.
_AIM = 0.98

# TBT is to hold with so many more sequences of a request's size in the batch, which asks more of the long than of the
# short.
_SIZES = 1.0


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
        tightest_s = view.forecast.tightest_tbt_s(worker)
        most = view.forecast.most(worker)
        if worker.cost.step_s(most.sequences, most.context_tokens) / _AIM <= tightest_s:
            self._note(False, tightest_s)
            return None
        load = view.forecast.load(worker, now + _WINDOW_S * _MOMENTS, now)
        # The longest, not the mean: contexts grow, and a promise that is broken in a tenth of the steps is broken.
        step_s = float(worker.cost.step_s(load.batch, load.context_tokens).max()) / _AIM
        self._note(step_s > tightest_s, tightest_s)
        broken_s = view.forecast.broken_work_s(worker, step_s)
        own_s = request.work_s
        saved_s, lost_s = (broken_s - own_s, 0.0) if request.slo.tbt_s < step_s else (broken_s, own_s)
        if saved_s <= lost_s:
            return None
        wish = Wish(worker, request.demand, request.slo.tbt_s, priority=request.priority, more=0.0)
        return full(drained_s(view, wish, now, self._promises))

    def _note(self, missed: bool, tightest_s: float) -> None:
        if not math.isinf(tightest_s):
            self._margin.observe(missed)

    def _late(self, view: ClusterView, request: RequestArrived, plan: Plan, limit: float, now: float) -> Refusal | None:
        within_s = request.slo.ttft_s * (limit if plan.prefill.queue_s > 0 else 1.0)  # an idle worker is for everyone
        late_s = plan.ttft_s - within_s
        if late_s <= 0:
            return None
        ahead = float(self._promises.before(np.array([math.inf]), request.priority, now)[0])
        queued_s = ahead * plan.prefill.compute_s / len(view.workers)
        return late(plan, request.slo, late_s + queued_s)

    def _crowded(
        self, view: ClusterView, request: RequestArrived, plan: Plan, limit: float, now: float
    ) -> Refusal | None:
        wish = self._wish(view, request, plan, limit, now)
        load = _foreseen(view, wish, now) if wish.tbt_s < math.inf else _booked(wish.worker, wish.demand)
        if load <= limit or (load <= 1.0 and not wish.worker.load.sequences):  # an idle worker is for everyone
            return None
        for_others = view.forecast.tightest_tbt_s(wish.worker) < request.slo.tbt_s
        return full(drained_s(view, wish, now, self._promises), for_others)

    def _wish(self, view: ClusterView, request: RequestArrived, plan: Plan, limit: float, now: float) -> Wish:
        """What the request asks of the planned decode worker."""
        worker = plan.decode.worker
        tbt_s = min(request.slo.tbt_s, view.forecast.tightest_tbt_s(worker))
        if tbt_s == math.inf:
            return Wish(worker, view.demand(request), tbt_s, limit=limit, priority=request.priority)
        margin = _SIZES + self._margin.sequences if worker.load.sequences else 0.0
        lead_s = max(0.0, first_token_at(request, plan, now) - now)
        return Wish(worker, view.demand(request), _AIM * tbt_s, lead_s, limit, margin, request.priority)


def _booked(worker: WorkerView, demand: Demand) -> float:
    """The part of places or pages that is taken with this request, counting what all may come to at the most."""
    report, load = worker.report, worker.load
    assert report is not None
    return max((load.sequences + 1) / report.max_sequences, (load.pages + demand.pages) / report.total_pages)


def _foreseen(view: ClusterView, wish: Wish, now: float) -> float:
    """The highest load with the request, from its first token on; or more, if that is within the limit even were
    nothing ever to end.
    """
    most = most_load(wish.worker, view.forecast.most(wish.worker), wish.demand, wish.tbt_s, margin=wish.margin)
    if most <= wish.limit:
        return most
    load = view.forecast.load(wish.worker, _moments(view, wish.worker, now + wish.lead_s), now)
    return float(decode_loads(wish.worker, load, wish.demand, wish.tbt_s, margin=wish.margin).max())


def _moments(view: ClusterView, worker: WorkerView, at: float) -> Floats:
    """When to look at the load if a request joins then."""
    last = view.forecast.last_start(worker)
    return at + max(_WINDOW_S, last - at) * _MOMENTS
