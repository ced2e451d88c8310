"""Where a request runs: Algorithm 1 of the Mooncake paper, behind the interface that other policies share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from perigee.scheduler.events import RequestArrived
from perigee.scheduler.ids import NodeId
from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView, Plan
from perigee.scheduler.worker_view import WorkerView

# Predictions that differ by less say nothing about who is better. To always follow them would send everything to one of
# two equal workers.
_NEAR = 1.05


class Placement(Protocol):
    """Chooses the workers of a request."""

    def place(self, view: ClusterView, pools: Pools, request: RequestArrived) -> Plan:
        """The plan over `pools`, which hold at least one worker for each phase."""
        ...


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a phase on one worker would come to: the TTFT from now, or the TBT."""

    worker: WorkerView
    seconds: float


@dataclass(frozen=True, slots=True)
class PrefillEstimate(Estimate):
    """`new_tokens` are computed, after what the store node `source` has of the prefix was pulled, if one is named."""

    new_tokens: int
    source: str = ""


_Estimate = TypeVar("_Estimate", bound=Estimate)


class LowestTtft:
    """Prefill where queue, getting the prefix and computing the rest end first; decode where the predicted TBT is
    lowest. Near ties go to decode workers of the same store node, and then to whoever was chosen least recently.
    """

    def place(self, view: ClusterView, pools: Pools, request: RequestArrived) -> Plan:
        demand = view.demand(request)
        held = view.prefixes.match(request.block_keys)
        prefill = best([_estimate(view, worker, request, held) for worker in pools.prefillers])
        decoders = pools.decoders_after(prefill.worker)
        decode = _nearest([Estimate(worker, worker.step_s(demand)) for worker in decoders], prefill.worker.store)
        store = prefill.worker.store
        return Plan(
            prefill=prefill.worker,
            decode=decode.worker,
            new_tokens=prefill.new_tokens,
            ttft_s=request.age_s + prefill.seconds,
            tbt_s=decode.seconds,
            prefill_source=prefill.source,
            decode_source=store if decode.worker.store != store else "",
        )


def best(estimates: Sequence[_Estimate]) -> _Estimate:
    """The least recently chosen worker of those that are as good as the best. `estimates` is not empty."""
    return min(_near(estimates), key=lambda estimate: (estimate.worker.last_chosen, estimate.worker.id))


def _near(estimates: Sequence[_Estimate]) -> list[_Estimate]:
    limit_s = _NEAR * min(estimate.seconds for estimate in estimates)
    return [estimate for estimate in estimates if estimate.seconds <= limit_s]


def _nearest(estimates: Sequence[Estimate], store: NodeId) -> Estimate:
    """One of those that are as good as the best, of this store node if there is any."""
    near = _near(estimates)
    return best([estimate for estimate in near if estimate.worker.store == store] or near)


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
    queue_s = cost.prefill_s(queued, 0) if queued else 0.0
    prefill_s = cost.prefill_s(new_tokens, prefix_tokens)
    return PrefillEstimate(worker, queue_s + transfer_s + cost.load_s(prefix_tokens) + prefill_s, new_tokens)
