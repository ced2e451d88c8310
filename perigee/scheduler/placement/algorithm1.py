"""Algorithm 1 of the Mooncake paper (FAST '25, section 3.3), whatever the rule for fetching cached prefixes.

For each prefill worker: how long the prompt waits for its turn, how long it takes to get the cached prefix, and to
compute the rest. The worker where that sums up to the least is taken. Decode goes where the predicted TBT is lowest.
"""

import numpy as np

from perigee.scheduler.events import RequestArrived
from perigee.scheduler.fleet import Rows
from perigee.scheduler.placement.base import decode_candidates, make_plan
from perigee.scheduler.placement.candidates import Candidates, least_recent, others
from perigee.scheduler.placement.prefill import FetchRule, PrefillOptions, Prompt
from perigee.scheduler.plan import Plan
from perigee.scheduler.pools import Pools
from perigee.scheduler.prefixes import positions
from perigee.scheduler.view import ClusterView

# Holders of a prompt are looked at as decode workers unless they are more than this.
_FEW = 16


class Algorithm1:
    """`price` is what a second of a worker's time counts for beside a second of waiting, for each prompt that waits on
    the average worker: the later ones wait for whatever this one takes. 0 looks at this request alone, as the paper.
    """

    def __init__(self, fetch: FetchRule, price: float = 0.0) -> None:
        self._fetch = fetch
        self._price = price

    def place(self, view: ClusterView, pools: Pools, request: RequestArrived, now: float) -> Plan:
        prompt, rows = Prompt(view, request, self._fetch, now), pools.prefiller_rows
        options = PrefillOptions(prompt, view.ranks.preview(request), now)
        weight = 1.0 + self._price * len(view.fleet.work) / len(rows)
        scores = options.work_s()
        scores *= weight
        scores += options.queue_s
        prefill = Candidates(rows, scores[rows])
        first = least_recent(view.fleet, prefill.near())
        step_s = view.fleet.step_s(view.demand(request))
        decoders = decode_candidates(pools, step_s, first).near()
        second = _nearest(prompt, decoders, first)
        considered = prefill.others(first), others(decoders, second)
        return make_plan(view, request, options, step_s, (first, second), considered)


def _nearest(prompt: Prompt, good: Rows, prefill_row: int) -> int:
    """Of the good decode workers one to whose store node little has to be moved: that of prefill itself, or else one
    that holds the most already, be it from the conversation's last turn.
    """
    fleet = prompt.view.fleet
    is_good = np.zeros(len(fleet.workers), np.bool_)
    is_good[good] = True
    here = [fleet.node_numbers.item(prefill_row)]
    few = [nodes for nodes in reversed(prompt.held.groups.values()) if nodes.bit_count() <= _FEW]
    for numbers in (here, *map(positions, few)):
        rows = [row for number in numbers for row in fleet.decoders_at.get(number, ()) if is_good[row]]
        if rows:
            return min(rows, key=fleet.last_chosen.item)
    return least_recent(fleet, good)
