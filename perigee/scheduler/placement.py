"""Where a request runs: Algorithm 1 of the Mooncake paper, behind the interface that other policies share."""

from dataclasses import dataclass
from typing import Protocol

from perigee.scheduler.events import RequestArrived
from perigee.scheduler.ids import NodeId
from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView, Plan
from perigee.scheduler.worker_view import Demand, WorkerView


class Placement(Protocol):
    """Chooses the workers of a request."""

    def place(self, view: ClusterView, pools: Pools, request: RequestArrived) -> Plan:
        """The plan over `pools`, which hold at least one worker for each phase."""
        ...


@dataclass(frozen=True, slots=True)
class PrefillEstimate:
    """What a prefill on one worker would come to."""

    worker: WorkerView
    source: str  # store node to pull the prefix from; empty: use the local one
    new_tokens: int
    ttft_s: float  # from now


class LowestTtft:
    """Prefill where queue, loading the prefix and computing the rest end first; decode where the predicted TBT is
    lowest. Ties go to whoever was chosen least recently.
    """

    def place(self, view: ClusterView, pools: Pools, request: RequestArrived) -> Plan:
        demand = view.demand(request)
        held = view.prefixes.match(request.block_keys)
        candidates = pools.mixed + (pools.prefill if pools.decode else ())
        estimates = [_estimate(view, worker, request, held) for worker in candidates]
        best = min(estimates, key=lambda each: (each.ttft_s, each.worker.last_chosen, each.worker.id))
        decode = best.worker if best.worker in pools.mixed else lowest_tbt(pools.decode, demand)
        return Plan(
            prefill=best.worker,
            decode=decode,
            prefill_source=best.source,
            decode_source="" if decode.store == best.worker.store else best.worker.store,
            new_tokens=best.new_tokens,
            ttft_s=request.age_s + best.ttft_s,
            tbt_s=decode.step_s(demand),
        )


def lowest_tbt(workers: tuple[WorkerView, ...], demand: Demand) -> WorkerView:
    """Whoever would decode the demand fastest. `workers` is not empty."""
    return min(workers, key=lambda worker: (worker.step_s(demand), worker.last_chosen, worker.id))


def _estimate(
    view: ClusterView, worker: WorkerView, request: RequestArrived, held: dict[NodeId, int]
) -> PrefillEstimate:
    """The faster of computing what the worker's own store lacks and pulling it from the node that holds most."""
    local_blocks = held.get(worker.store, 0)
    local = _estimate_from(view, worker, request, "", local_blocks, 0)
    richest = max(held, key=lambda node: (held[node], node), default=None)
    if richest is None or held[richest] <= local_blocks:
        return local
    remote = _estimate_from(view, worker, request, richest, held[richest], held[richest] - local_blocks)
    return min(local, remote, key=lambda estimate: estimate.ttft_s)


def _estimate_from(
    view: ClusterView, worker: WorkerView, request: RequestArrived, source: str, blocks: int, pulled_blocks: int
) -> PrefillEstimate:
    """With a prefix of `blocks`, of which `pulled_blocks` come from `source`."""
    assert view.card is not None
    # The last token is computed whatever is cached: the first output token is drawn from its logits.
    prefix_tokens = min(blocks * view.card.block_tokens, request.num_tokens - 1)
    new_tokens = request.num_tokens - prefix_tokens
    cost = worker.cost
    queued = worker.queued_prefill_tokens
    queue_s = cost.prefill_s(queued, 0) if queued else 0.0
    load_s = cost.load_s(prefix_tokens) + cost.transfer_s(pulled_blocks * view.card.block_tokens)
    return PrefillEstimate(worker, source, new_tokens, queue_s + load_s + cost.prefill_s(new_tokens, prefix_tokens))
