"""Algorithm 1 of the Mooncake paper (FAST '25, section 3.3)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from perigee.scheduler.events import RequestArrived
from perigee.scheduler.ids import NodeId
from perigee.scheduler.placement.base import best, near
from perigee.scheduler.plan import DecodeEstimate, Plan, PrefillEstimate
from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView
from perigee.scheduler.worker_view import WorkerView


class LowestTtft:
    """Prefill where queue, getting the prefix and computing the rest end first; decode where the predicted TBT is
    lowest. Near ties go to decode workers of the same store node, and then to whoever was chosen least recently.
    """

    def place(self, view: ClusterView, pools: Pools, request: RequestArrived, now: float) -> Plan:
        demand = view.demand(request)
        held = view.prefixes.match(request.block_keys)
        prefill = best([_estimate(view, worker, request, held) for worker in pools.prefillers])
        store = prefill.worker.store
        decoders = pools.decoders_after(prefill.worker)
        decode = _nearest([DecodeEstimate(worker, worker.step_s(demand)) for worker in decoders], store)
        return Plan(
            prefill=prefill,
            decode=decode,
            ttft_s=request.age_s + prefill.seconds,
            tbt_s=decode.seconds,
            decode_source=store if decode.worker.store != store else "",
        )


def _nearest(estimates: Sequence[DecodeEstimate], store: NodeId) -> DecodeEstimate:
    """One of those that are as good as the best, of this store node if there is any."""
    good = near(estimates)
    return best([estimate for estimate in good if estimate.worker.store == store] or good)


def _estimate(
    view: ClusterView, worker: WorkerView, request: RequestArrived, held: Mapping[NodeId, int]
) -> PrefillEstimate:
    """The faster of two ways: with the prefix that the worker's store node holds, or with the longest that any does."""
    local = _after_queue(view, worker, request, held.get(worker.store, 0), 0.0)
    holder = max(held, key=lambda node: (held[node], node), default=worker.store)
    more = held.get(holder, 0) - held.get(worker.store, 0)
    if more <= 0:
        return local
    assert view.card is not None
    transfer_s = worker.cost.transfer_s(more * view.card.block_tokens)
    pulled = replace(_after_queue(view, worker, request, held[holder], transfer_s), source=holder)
    return min(local, pulled, key=lambda estimate: estimate.seconds)


def _after_queue(
    view: ClusterView, worker: WorkerView, request: RequestArrived, num_blocks: int, transfer_s: float
) -> PrefillEstimate:
    """Queue, then the prefix of `num_blocks`, then the computation of the rest.

    The last token is computed whatever is cached: the first output token is drawn from its logits.
    """
    assert view.card is not None
    cost = worker.cost
    new_tokens = max(1, request.num_tokens - num_blocks * view.card.block_tokens)
    prefix_tokens = request.num_tokens - new_tokens
    queued = worker.queued_prefill_tokens
    return PrefillEstimate(
        worker,
        new_tokens,
        prefix_tokens,
        queue_s=cost.prefill_s(queued, 0) if queued else 0.0,
        transfer_s=transfer_s,
        load_s=cost.load_s(prefix_tokens),
        compute_s=cost.prefill_s(new_tokens, prefix_tokens),
    )
