"""Where a request runs: Algorithm 1 of the Mooncake paper, behind the interface that other policies share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from perigee.scheduler.events import RequestArrived
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


class LowestTtft:
    """Prefill where queue, loading the prefix and computing the rest end first; decode, on a worker of the same store
    node, where the predicted TBT is lowest. Near ties go to whoever was chosen least recently.
    """

    def place(self, view: ClusterView, pools: Pools, request: RequestArrived) -> Plan:
        demand = view.demand(request)
        new_tokens = _new_tokens(view, pools.prefillers, request)
        prefill = best([_estimate(worker, request, new_tokens[worker.store]) for worker in pools.prefillers])
        decoders = pools.decoders_after(prefill.worker)
        decode = best([Estimate(worker, worker.step_s(demand)) for worker in decoders])
        return Plan(
            prefill=prefill.worker,
            decode=decode.worker,
            new_tokens=new_tokens[prefill.worker.store],
            ttft_s=request.age_s + prefill.seconds,
            tbt_s=decode.seconds,
        )


def best(estimates: Sequence[Estimate]) -> Estimate:
    """The least recently chosen worker of those that are as good as the best. `estimates` is not empty."""
    limit_s = _NEAR * min(estimate.seconds for estimate in estimates)
    near = [estimate for estimate in estimates if estimate.seconds <= limit_s]
    return min(near, key=lambda estimate: (estimate.worker.last_chosen, estimate.worker.id))


def _new_tokens(view: ClusterView, workers: Sequence[WorkerView], request: RequestArrived) -> dict[str, int]:
    """Tokens to compute, by store node: all after the prefix that the node holds.

    The last token is computed whatever is cached: the first output token is drawn from its logits.
    """
    assert view.card is not None
    held = view.prefixes.match(request.block_keys)
    block_tokens = view.card.block_tokens
    return {
        node: max(1, request.num_tokens - held.get(node, 0) * block_tokens)
        for node in {worker.store for worker in workers}
    }


def _estimate(worker: WorkerView, request: RequestArrived, new_tokens: int) -> Estimate:
    """Queue, then the load of what is cached, then the computation of `new_tokens`."""
    cost = worker.cost
    queued = worker.queued_prefill_tokens
    queue_s = cost.prefill_s(queued, 0) if queued else 0.0
    prefix_tokens = request.num_tokens - new_tokens
    return Estimate(worker, queue_s + cost.load_s(prefix_tokens) + cost.prefill_s(new_tokens, prefix_tokens))
