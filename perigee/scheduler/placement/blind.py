"""Baselines that choose without looking at what is cached. What the chosen worker's own store node holds is used."""

from hashlib import blake2b

import numpy as np

from perigee.scheduler.events import RequestArrived
from perigee.scheduler.fleet import Rows
from perigee.scheduler.placement.base import decode_candidates, make_plan
from perigee.scheduler.placement.candidates import Candidates, least_recent
from perigee.scheduler.placement.fetching import NoFetch
from perigee.scheduler.placement.prefill import PrefillOptions, Prompt
from perigee.scheduler.plan import Plan
from perigee.scheduler.pools import Pools
from perigee.scheduler.view import ClusterView


class Random:
    """Any worker, drawn by a hash of the request's name, so that the same request draws the same again."""

    def place(self, view: ClusterView, pools: Pools, request: RequestArrived, now: float) -> Plan:
        first = _draw(pools.prefiller_rows, request, "prefill")
        second = _draw(pools.decoder_rows_after(view.fleet.worker(first)), request, "decode")
        return _plan(view, pools, request, (first, second), now)


class RoundRobin:
    """One worker after the other."""

    def __init__(self) -> None:
        self._num_placed = 0

    def place(self, view: ClusterView, pools: Pools, request: RequestArrived, now: float) -> Plan:
        first = _nth(pools.prefiller_rows, self._num_placed)
        second = _nth(pools.decoder_rows_after(view.fleet.worker(first)), self._num_placed)
        self._num_placed += 1
        return _plan(view, pools, request, (first, second), now)


class LeastLoaded:
    """The prefill worker with the shortest queue, in predicted seconds, and the decode worker with the fewest
    sequences, of several the one with the least context.
    """

    def place(self, view: ClusterView, pools: Pools, request: RequestArrived, now: float) -> Plan:
        fleet, rows = view.fleet, pools.prefiller_rows
        queue_s = fleet.queue_s(view.ranks.preview(request), now)[rows]
        first = least_recent(fleet, rows[queue_s == queue_s.min()])
        rows = pools.decoder_rows_after(fleet.worker(first))
        order = np.lexsort((fleet.last_chosen[rows], fleet.context_tokens[rows], fleet.sequences[rows]))
        return _plan(view, pools, request, (first, int(rows[order[0]])), now)


def _plan(view: ClusterView, pools: Pools, request: RequestArrived, chosen: tuple[int, int], now: float) -> Plan:
    prompt, rows = Prompt(view, request, NoFetch(), now), pools.prefiller_rows
    options = PrefillOptions(prompt, view.ranks.preview(request), now)
    prefill = Candidates(rows, (options.queue_s + options.work_s())[rows])
    step_s = view.fleet.step_s(view.demand(request))
    considered = prefill.others(chosen[0]), decode_candidates(pools, step_s, chosen[0]).others(chosen[1])
    return make_plan(view, request, options, step_s, chosen, considered)


def _draw(rows: Rows, request: RequestArrived, phase: str) -> int:
    digest = blake2b(f"{request.server}/{request.ref}/{phase}".encode(), digest_size=8).digest()
    return _nth(rows, int.from_bytes(digest, "little"))


def _nth(rows: Rows, number: int) -> int:
    return int(rows[number % len(rows)])
