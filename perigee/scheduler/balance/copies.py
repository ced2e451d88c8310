"""Copies of blocks: more of what is missed, fewer of what is not asked for.

Algorithm 1 makes copies by itself: where a prompt goes to a node that lacks its prefix, the prefix is fetched and
stays. What that leaves to be done ahead of need is the fetch that the next prompt would wait for on the next node. So a
hot prefix is copied to another node only if the misses to be expected there cost more than the copy does; one node
after the other, and only over links that have nothing else to do.

Trimming is what makes room. A node that evicts by itself knows only when its own copy was used: it drops the last copy
of one block and keeps the third of another. To trim cold copies before the node has to choose is to keep more different
blocks in the cluster; and a trimmed copy costs a fetch at worst where an evicted last one costs the computation. (After
"N-chance forwarding", Dahlin et al., OSDI 1994.) The last copy is never trimmed, nor one whose only others are on nodes
that are short of room themselves: those may be evicted at any moment, and then both are gone.
"""

from collections.abc import Collection

from perigee.kvstore.blocks import BlockKey
from perigee.scheduler.balance.base import Move
from perigee.scheduler.commands import Replicate, Trim
from perigee.scheduler.hot_prefixes import HotPrefix
from perigee.scheduler.ids import NodeId
from perigee.scheduler.view import ClusterView

# Of the prefixes that were missed most, so many are looked at each time, and so many are copied at the most.
_LOOKED_AT = 8
_COPIES = 2

# A copy that was asked for comes within this, or does not.
_COPY_WITHIN_S = 30.0

# What misses cost is expected to be half of what they cost in the last minutes, and must come to this many copies.
_EXPECTED = 0.5
_WORTH = 1.0

# A node is short of room from this on. A copy is cold that nobody asked for in so many seconds.
FULL = 0.85
COLD_S = 30.0

# So many blocks are looked at each time, and trimmed from one node.
_MOST_LOOKED_AT = 4096
_MOST_TRIMMED = 256


class Copies:
    """Replicates and trims."""

    makes_copies = True

    def __init__(self) -> None:
        self._coming: dict[tuple[NodeId, BlockKey], float] = {}  # what was asked for, and until when it may come

    def tick(self, view: ClusterView, now: float) -> list[Move]:
        return [*self._replicate(view, now), *_trims(view, now)]

    def _replicate(self, view: ClusterView, now: float) -> list[Move]:
        self._coming = {what: until for what, until in self._coming.items() if until > now}
        said: list[Move] = []
        busy: set[NodeId] = set()
        for hot in view.hot_prefixes.hottest(_LOOKED_AT, now):
            copy = self._copy(view, hot, busy, now)
            if copy is not None and len(said) < _COPIES:
                said.append(copy)
                busy |= {copy.source, copy.node_id}
                self._coming[copy.node_id, copy.keys[-1]] = now + _COPY_WITHIN_S
        return said

    def _copy(self, view: ClusterView, hot: HotPrefix, busy: Collection[NodeId], now: float) -> Replicate | None:
        """To one more node, if it is worth that, and both nodes have time for it."""
        last = hot.keys[-1]
        holders = view.prefixes.holders(last)
        lacking = _lacking(view, holders, now)
        if not holders or not lacking or view.card is None:
            return None
        copy_s = view.profile.transfer_s(float(len(hot.keys) * view.card.block_tokens))
        if _EXPECTED * hot.lately_s(now) / len(lacking) < _WORTH * copy_s:
            return None
        sources = [node for node in holders if node not in busy]
        targets = [node for node in lacking if node not in busy and (node, last) not in self._coming]
        pair = _idle_pair(view, sources, targets, now)
        return Replicate(pair[1], pair[0], BlockKey(view.card.namespace), hot.keys) if pair is not None else None


def _lacking(view: ClusterView, holders: list[NodeId], now: float) -> list[NodeId]:
    """Nodes of workers that prefill and lack it, those first whose workers will be free first."""
    wait_s = view.fleet.queue_s(float("inf"), now)
    workers = sorted(view.pools(now).prefillers, key=lambda worker: (wait_s[worker.row], worker.id))
    return [node for node in dict.fromkeys(worker.store for worker in workers) if node not in holders]


def _idle_pair(
    view: ClusterView, sources: list[NodeId], targets: list[NodeId], now: float
) -> tuple[NodeId, NodeId] | None:
    """The first two between which a copy need not wait, and so does not hold up anyone else."""
    numbers = view.prefixes.numbers
    known = [node for node in targets if node in numbers]
    for source in sources:
        for target in known:
            if view.transfers.wait_s(numbers[source], numbers[target], now) <= 0:
                return source, target
    return None


def _trims(view: ClusterView, now: float) -> list[Move]:
    """Of the nodes that are short of room, the copies that were used longest ago, if a node has them that is not."""
    to_free = _to_free(view)
    roomy = [node for node in view.stores if node not in to_free]
    said: list[Move] = []
    looked_at = 0
    for run in view.copy_log.unused(now - COLD_S) if to_free and roomy else ():
        for node in [node for node in run.nodes if to_free.get(node, 0) > 0]:
            looked_at += len(run.keys)
            if keys := tuple(view.prefixes.shared(run.keys, node, roomy)):
                said.append(Trim(node, keys))
                to_free[node] -= len(keys)
            if keys or not view.prefixes.shared(run.keys, node, [node]):  # it has none of them any more
                view.copy_log.remove(node, run)
        if looked_at > _MOST_LOOKED_AT:
            break
    return said


def _to_free(view: ClusterView) -> dict[NodeId, int]:
    """The nodes that are short of room, and how many blocks should go."""
    to_free = {}
    for node, store in view.stores.items():
        excess = view.prefixes.num_in_dram(node) - int(FULL * store.num_slots)
        if store.num_slots and excess > 0:
            to_free[node] = min(excess, _MOST_TRIMMED)
    return to_free
