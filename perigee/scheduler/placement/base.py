"""The interface of placement policies, and what they share."""

from typing import Protocol

from perigee.scheduler.events import RequestArrived
from perigee.scheduler.placement.candidates import Candidates
from perigee.scheduler.placement.prefill import PrefillOptions
from perigee.scheduler.plan import DecodeEstimate, Plan
from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView


class Placement(Protocol):
    """Chooses the workers of a request."""

    def place(self, view: ClusterView, pools: Pools, request: RequestArrived, now: float) -> Plan:
        """The plan over `pools`, which hold at least one worker for each phase. Changes nothing in the view."""
        ...


def decode_candidates(view: ClusterView, pools: Pools, request: RequestArrived, prefill_row: int) -> Candidates:
    """Who may decode what was prefilled there, by predicted TBT."""
    rows = pools.decoder_rows_after(view.fleet.worker(prefill_row))
    return Candidates(rows, view.fleet.step_s(view.demand(request))[rows])


def decode_estimate(view: ClusterView, request: RequestArrived, row: int) -> DecodeEstimate:
    """What decoding comes to on one worker."""
    worker = view.fleet.worker(row)
    return DecodeEstimate(worker, worker.step_s(view.demand(request)))


def make_plan(
    view: ClusterView,
    request: RequestArrived,
    options: PrefillOptions,
    chosen: tuple[int, int],
    considered: tuple[list[int], list[int]],
) -> Plan:
    """The plan for the rows `chosen` for the two phases, with others that were `considered`."""
    first = options.estimate(chosen[0])
    second = decode_estimate(view, request, chosen[1])
    store = first.worker.store
    return Plan(
        prefill=first,
        decode=second,
        ttft_s=request.age_s + view.costs.handling.seconds + first.seconds,
        tbt_s=second.seconds,
        decode_source=store if second.worker.store != store else "",
        considered=tuple(options.estimate(row) for row in considered[0]),
        considered_decode=tuple(decode_estimate(view, request, row) for row in considered[1]),
    )
