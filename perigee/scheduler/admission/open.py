"""No admission control."""

from perigee.scheduler.admission.base import Refusal
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.plan import Plan
from perigee.scheduler.view import ClusterView, InFlight


class Open:
    """Lets everything in; what has no room waits for it."""

    def admit(self, view: ClusterView, request: RequestArrived, plan: Plan, now: float) -> Refusal | None:
        return None

    def proceed(self, view: ClusterView, request: InFlight, now: float) -> Refusal | None:
        return None
