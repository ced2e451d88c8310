"""Who is let in. Rejecting early, before a prompt is computed in vain, is what keeps an overloaded cluster useful."""

from dataclasses import dataclass
from typing import Protocol

from perigee.scheduler.commands import RejectReason
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView
from perigee.scheduler.worker_view import Demand

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0

# For want of a worker: about what one takes to start.
UNAVAILABLE_RETRY_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not, when trying again may help (0: never), and who would have to serve it nevertheless, if anyone could."""

    reason: RejectReason
    message: str
    retry_after_s: float = 0.0
    pools: Pools | None = None


class Admission(Protocol):
    """Decides at arrival."""

    def admit(self, view: ClusterView, request: RequestArrived, now: float) -> Pools | Refusal:
        """The workers that the request may be placed on (at least one for each phase), or why there are none."""
        ...


class RoomAtArrival:
    """Lets in what some decode worker has pages and a place in its batch for, now."""

    def admit(self, view: ClusterView, request: RequestArrived, now: float) -> Pools | Refusal:
        usable = view.pools(now)
        if not usable.can_serve:
            return _unavailable(usable)
        demand = view.demand(request)
        large_enough = usable.holding(demand)
        if not large_enough.can_serve:
            return _too_large(usable, demand)
        storable = large_enough.at(view.stores_for(demand.prompt_pages))
        if not storable.can_serve:
            return _too_many_blocks(view, demand)
        with_room = storable.with_room(demand)
        return with_room if with_room.can_serve else _overload(storable, demand, now)


def _unavailable(pools: Pools) -> Refusal:
    missing = [role for role, workers in (("prefill", pools.prefill), ("decode", pools.decode)) if not workers]
    message = f"no {' and no '.join(missing)} worker is available"
    return Refusal(RejectReason.UNAVAILABLE, message, UNAVAILABLE_RETRY_AFTER_S)


def _too_large(pools: Pools, demand: Demand) -> Refusal:
    largest = max((worker.report.total_pages for worker in pools.decoders if worker.report), default=0)
    message = f"the request may take {demand.pages} pages of KVCache; the largest decode worker has {largest}"
    return Refusal(RejectReason.TOO_LARGE, message)


def _too_many_blocks(view: ClusterView, demand: Demand) -> Refusal:
    most = max(store.num_slots for store in view.stores.values())
    message = f"the prompt has {demand.prompt_pages} blocks of KVCache; the largest store node has {most} slots"
    return Refusal(RejectReason.TOO_LARGE, message)


def _overload(pools: Pools, demand: Demand, now: float) -> Refusal:
    """`retry_after_s` is when the first decode worker is predicted to have drained enough."""
    ends = [at for worker in pools.decoders if (at := worker.room_at(demand)) is not None]
    drain_s = min(ends) - now if ends else MAX_RETRY_AFTER_S
    return Refusal(
        RejectReason.OVERLOAD,
        f"all {len(pools.decoders)} decode workers are full",
        retry_after_s=min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, drain_s)),
        pools=pools,
    )
