"""What no policy can help: requests that no worker or store node could serve, were all of them idle."""

from perigee.scheduler.admission.base import Refusal
from perigee.scheduler.commands import RejectReason
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView
from perigee.scheduler.worker_view import Demand

# For want of a worker: about what one takes to start.
UNAVAILABLE_RETRY_AFTER_S = 5.0


def able(view: ClusterView, request: RequestArrived, now: float) -> Pools | Refusal:
    """The workers that could serve the request, at least one for each phase, or why there are none."""
    usable = view.pools(now)
    if not usable.can_serve:
        return _unavailable(usable)
    demand = view.demand(request)
    large_enough = usable.holding(demand)
    if not large_enough.can_serve:
        return _too_large(usable, demand)
    storable = large_enough.storing(demand.prompt_pages)
    return storable if storable.can_serve else _too_many_blocks(view, demand)


def _unavailable(pools: Pools) -> Refusal:
    by_role = {"prefill": pools.prefill_rows, "decode": pools.decode_rows}
    missing = [role for role, rows in by_role.items() if not rows.size]
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
