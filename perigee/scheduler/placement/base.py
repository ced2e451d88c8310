"""The interface of placement policies, and what they share."""

from typing import Protocol

from perigee.scheduler.events import RequestArrived
from perigee.scheduler.fleet import Floats
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


def decode_candidates(pools: Pools, step_s: Floats, prefill_row: int) -> Candidates:
    """Who may decode what was prefilled there, by predicted TBT: `step_s`, by row of the fleet."""
    rows = pools.decoder_rows_after(pools.fleet.worker(prefill_row))
    return Candidates(rows, step_s[rows])


def make_plan(
    view: ClusterView,
    request: RequestArrived,
    options: PrefillOptions,
    step_s: Floats,
    chosen: tuple[int, int],
    considered: tuple[list[int], list[int]],
) -> Plan:
    """The plan for the rows `chosen` for the two phases, with others that were `considered`."""
    workers = view.fleet.worker
    estimate = options.prompt.estimate
    first = estimate(options.spot(chosen[0]))
    second = DecodeEstimate(workers(chosen[1]), step_s.item(chosen[1]))
    store = first.worker.store
    return Plan(
        prefill=first,
        decode=second,
        ttft_s=request.age_s + view.costs.handling.seconds + first.seconds,
        tbt_s=second.seconds,
        decode_source=store if second.worker.store != store else "",
        others=tuple([options.spot(row) for row in considered[0]]),
        estimate=estimate,
        considered_decode=tuple([DecodeEstimate(workers(row), step_s.item(row)) for row in considered[1]]),
    )
