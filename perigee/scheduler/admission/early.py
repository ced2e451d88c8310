"""Early rejection: at arrival, by today's decode load (Mooncake's arXiv version, section 7.2)."""

from perigee.scheduler.admission.base import MAX_RETRY_AFTER_S, Refusal, within_bounds
from perigee.scheduler.commands import RejectReason
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.plan import Plan
from perigee.scheduler.view import ClusterView, InFlight
from perigee.scheduler.worker_view import Demand


class Early:
    """Lets in what the planned decode worker has pages and a place in its batch for, now."""

    def admit(self, view: ClusterView, request: RequestArrived, plan: Plan, now: float) -> Refusal | None:
        demand = view.demand(request)
        if plan.decode.worker.has_room(demand):
            return None
        return Refusal(RejectReason.OVERLOAD, "all decode workers are full", _drain_s(view, demand, now))

    def proceed(self, view: ClusterView, request: InFlight, now: float) -> Refusal | None:
        return None


def _drain_s(view: ClusterView, demand: Demand, now: float) -> float:
    """When the first decode worker is predicted to have drained enough."""
    ends = [at for worker in view.pools(now).decoders if (at := worker.room_at(demand)) is not None]
    return within_bounds(min(ends) - now if ends else MAX_RETRY_AFTER_S)
