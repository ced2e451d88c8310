"""The policies of Mooncake's paper (arXiv 2407.00079, section 7). Load is that of the slower stage: predicted TTFT over
its bound for prefill, and for decode the fullest of places, pages, and predicted TBT over its bound.

What these three have in common is a constant view of decoding: who decodes now, or who would if each answer took the
same time. All of them ask again when the prompt is computed, and what is refused then was computed in vain.
"""

import math

import numpy as np

from perigee.scheduler.admission.base import Refusal, decode_loads, first_token_at, full, late
from perigee.scheduler.admission.retry import Wish, drained_s
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.plan import Plan
from perigee.scheduler.slo import Slo
from perigee.scheduler.view import ClusterView, InFlight
from perigee.scheduler.worker_view import Demand, WorkerView


class AtDecode:
    """The baseline: at arrival by the load of prefill alone; that of decode counts once the prompt is computed."""

    def admit(self, view: ClusterView, request: RequestArrived, plan: Plan, now: float) -> Refusal | None:
        late_s = plan.ttft_s - request.slo.ttft_s  # a queue drains by a second each second
        return late(plan, request.slo, late_s) if late_s > 0 else None

    def proceed(self, view: ClusterView, request: InFlight, now: float) -> Refusal | None:
        """The worker's load counts the request already."""
        worker = view.workers[request.decode]
        if _load(view, worker, request.demand, request.slo, now, math.inf, more=0) <= 1:
            return None
        return full(drained_s(view, Wish(worker, request.demand, request.slo.tbt_s, more=0.0), now))


class Early(AtDecode):
    """Early rejection (7.2): at arrival, by today's load of decode, too.

    Today's load knows nothing of the prompts that are being computed. While decode has room everything is let in, for
    as long as a prompt takes; then all of that arrives, and everything is refused until it has drained (7.3). The load
    of decode swings with a period of that lag.
    """

    def admit(self, view: ClusterView, request: RequestArrived, plan: Plan, now: float) -> Refusal | None:
        return super().admit(view, request, plan, now) or _crowded(view, request, plan, now, now, math.inf)


class Prediction(AtDecode):
    """Early rejection by prediction (7.4): by the load of decode when this prompt will be computed, if each answer
    takes the same time to decode: the mean of those seen lately. Those that have decoded for longer count as gone.
    """

    def admit(self, view: ClusterView, request: RequestArrived, plan: Plan, now: float) -> Refusal | None:
        at = first_token_at(request, plan, now)
        refusal = super().admit(view, request, plan, now)
        return refusal or _crowded(view, request, plan, now, at, view.mean_decode_s)


def _crowded(
    view: ClusterView, request: RequestArrived, plan: Plan, now: float, at: float, decode_s: float
) -> Refusal | None:
    demand, worker = view.demand(request), plan.decode.worker
    if _load(view, worker, demand, request.slo, at, decode_s, more=1) <= 1:
        return None
    return full(drained_s(view, Wish(worker, demand, request.slo.tbt_s, lead_s=max(0.0, at - now)), now))


def _load(
    view: ClusterView, worker: WorkerView, demand: Demand, slo: Slo, at: float, decode_s: float, more: int
) -> float:
    load = view.forecast.load_after(worker, np.array([at]), decode_s)
    return float(decode_loads(worker, load, demand, slo.tbt_s, more)[0])
