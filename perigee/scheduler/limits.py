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
        return _too_large(view, usable, demand)
    storable = large_enough.storing(demand.prompt_pages)
    return storable if storable.can_serve else _too_many_blocks(large_enough, demand)


def _unavailable(pools: Pools) -> Refusal:
    by_role = {"prefill": pools.prefill_rows, "decode": pools.decode_rows}
    missing = [role for role, rows in by_role.items() if not rows.size]
    message = f"no {' and no '.join(missing)} worker is available"
    return Refusal(RejectReason.UNAVAILABLE, message, UNAVAILABLE_RETRY_AFTER_S)


def _too_large(view: ClusterView, usable: Pools, demand: Demand) -> Refusal:
    if _all_known(view).holding(demand).can_serve:
        message = "the workers that are large enough for the request take no work now"
        return Refusal(RejectReason.UNAVAILABLE, message, UNAVAILABLE_RETRY_AFTER_S)
    pages = usable.fleet.total_pages
    most = int(pages[usable.decoder_rows].max())
    message = f"the request may take {demand.pages} pages of KVCache; the largest decode worker has {most}"
    if most >= demand.pages:
        most = int(pages[usable.prefill_rows].max())
        message = f"the prompt takes {demand.prompt_pages} pages of KVCache; the largest prefill worker has {most}"
    return Refusal(RejectReason.TOO_LARGE, message)


def _all_known(view: ClusterView) -> Pools:
    """With those that are silent or being drained: they may come back, and are no reason to refuse for good."""
    return Pools.of(view.fleet, [worker for worker in view.workers.values() if not worker.excluded])


def _too_many_blocks(pools: Pools, demand: Demand) -> Refusal:
    slots = pools.fleet.store_slots
    most = {"prefill": slots[pools.prefiller_rows].max(), "decode": slots[pools.decoder_rows].max()}
    phase = min(most, key=most.__getitem__)
    message = (
        f"the prompt has {demand.prompt_pages} blocks of KVCache; "
        f"the largest store node of a {phase} worker has {most[phase]:.0f} slots"
    )
    return Refusal(RejectReason.TOO_LARGE, message)
