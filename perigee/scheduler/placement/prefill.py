"""What prefilling a prompt would come to, on one worker or on many at once.

It depends on how many blocks a worker's own store node holds, and on what can be fetched from others. Most workers hold
equally many, mostly none or a beginning that all prompts share, so the ways to go are worked out once for each number
of blocks. What then differs between workers is how long their queues are, how long their store nodes still receive, and
how far they are from the profile.
"""

from functools import reduce
from typing import Protocol

import numpy as np

from perigee.scheduler.events import RequestArrived
from perigee.scheduler.fleet import Floats, Rows
from perigee.scheduler.plan import PrefillEstimate, PrefillWay, Spot
from perigee.scheduler.prefixes import Match, flags, positions
from perigee.scheduler.view import ClusterView

# So few workers are looked at one by one.
_FEW = 4


class Prompt:
    """A prompt, what the cluster holds of it, and the ways to prefill it that a rule allows."""

    def __init__(self, view: ClusterView, request: RequestArrived, rule: "FetchRule", now: float) -> None:
        assert view.card is not None
        self.view = view
        self.num_tokens = request.num_tokens
        self.block_tokens = view.card.block_tokens
        self.held: Match = view.prefixes.match(request.block_keys)
        self._rule = rule
        self._ways: dict[int, list[PrefillWay]] = {}  # by number of blocks held
        self._now = now

    # ---- what rules ask

    def delay_s(self, number: int) -> float:
        """How much later a node sends than one that sends nothing and has all in memory."""
        return self.view.transfers.send_wait_s(number, self._now) + self.promote_s(number)

    def computing(self, local_blocks: int) -> PrefillWay:
        """With what is held locally."""
        return PrefillWay(*self._with(local_blocks))

    def fetching(self, local_blocks: int, source: int, blocks: int, waits: bool = True) -> PrefillWay:
        """With the `blocks` that the node of number `source` holds, which are more. Whether or not the transfer waits
        for others that were ordered before.
        """
        profile, missing = self.view.profile, blocks - local_blocks
        on_ssd = min(missing, self.held.ssd_blocks.get(source, 0))
        transfer_s = profile.transfer_s(float(missing * self.block_tokens))
        if on_ssd:
            transfer_s += profile.promote_s(float(on_ssd * self.block_tokens))
        new_tokens, prefix_tokens, load_s, compute_s = self._with(blocks)
        return PrefillWay(
            new_tokens,
            prefix_tokens,
            load_s,
            compute_s,
            remote_tokens=prefix_tokens - local_blocks * self.block_tokens,
            source=self.view.prefixes.node(source),
            transfer_s=transfer_s,
            wait_s=self.view.transfers.send_wait_s(source, self._now) if waits else 0.0,
        )

    def _with(self, blocks: int) -> tuple[int, int, float, float]:
        """New tokens, those of the prefix, loading and computing, with so many blocks cached. The last token is
        computed whatever is cached: the first output token is drawn from its logits.
        """
        profile, prefix_tokens = self.view.profile, min(blocks * self.block_tokens, self.num_tokens - 1)
        new_tokens = self.num_tokens - prefix_tokens
        return new_tokens, prefix_tokens, profile.load_s(prefix_tokens), profile.prefill_s(new_tokens, prefix_tokens)

    # ---- what it comes to

    def promote_s(self, number: int) -> float:
        """How long a node takes to read what it has of the prompt on SSD alone."""
        blocks = self.held.ssd_blocks.get(number)
        return self.view.profile.promote_s(float(blocks * self.block_tokens)) if blocks else 0.0

    def ways(self, blocks: int) -> list[PrefillWay]:
        """The ways to go where so many blocks are held."""
        ways = self._ways.get(blocks)
        if ways is None:
            ways = self._ways[blocks] = self._rule.ways(self, blocks)
        return ways

    def work_s(self, spot: Spot, blocks: int) -> float:
        """The work on one worker, whose node holds so many blocks, but for its offset."""
        return self._fastest(spot, blocks)[0] + self.promote_s(spot.number)

    def estimate(self, spot: Spot) -> PrefillEstimate:
        """What it comes to on one worker."""
        _, way, wait_s = self._fastest(spot, self.held.blocks(spot.number))
        return PrefillEstimate(
            spot.worker,
            way,
            queue_s=spot.queue_s,
            transfer_s=wait_s + way.transfer_s,
            load_s=self.promote_s(spot.number) + spot.load_factor * way.load_s,
            compute_s=spot.prefill_factor * way.compute_s + spot.prefill_offset_s,
            ssd_tokens=min(
                self.held.ssd_blocks.get(spot.number, 0) * self.block_tokens, way.prefix_tokens - way.remote_tokens
            ),
        )

    def _fastest(self, spot: Spot, blocks: int) -> tuple[float, PrefillWay, float]:
        """The work that depends on the way there, the way, and how long its transfer waits."""
        best: tuple[float, PrefillWay, float] | None = None
        for way in self.ways(blocks):
            work_s = way.cached_s(spot.load_factor, spot.prefill_factor)
            wait_s = 0.0
            if way.source:
                wait_s = max(way.wait_s, spot.receives_s)
                work_s += wait_s + way.transfer_s
            if best is None or work_s < best[0]:
                best = work_s, way, wait_s
        assert best is not None, "a rule gives at least one way"
        return best


class FetchRule(Protocol):
    """Says which ways there are to prefill a prompt."""

    def ways(self, prompt: Prompt, local_blocks: int) -> list[PrefillWay]:
        """Where so many blocks are held; at least one."""
        ...


class PrefillOptions:
    """The fastest way for each worker, now."""

    def __init__(self, prompt: Prompt, rank: float, now: float) -> None:
        view = prompt.view
        self.prompt = prompt
        self.queue_s = view.fleet.queue_s(rank, now)
        self._receives_s = view.transfers.receive_wait_s(view.fleet.node_numbers, now)  # below 0 if it does not
        self._fleet = view.fleet

    def work_s(self) -> Floats:
        """What each worker has to do with the prompt, by row of the fleet."""
        prompt, fleet, groups = self.prompt, self._fleet, self._groups()
        usual = max(groups, key=lambda blocks: groups[blocks].bit_count())
        work_s = self._work_of(usual, slice(None))
        one_by_one = {number: prompt.held.blocks(number) for number in prompt.held.ssd_blocks}
        for blocks, nodes in groups.items():
            if blocks == usual:
                continue
            if nodes.bit_count() <= _FEW:
                one_by_one.update(dict.fromkeys(positions(nodes), blocks))
            else:
                rows = np.flatnonzero(flags(nodes, prompt.view.prefixes.num_numbers + 1)[fleet.node_numbers])
                work_s[rows] = self._work_of(blocks, rows)
        for number, blocks in one_by_one.items():
            for row in fleet.prefillers_at.get(number, ()):
                work_s[row] = prompt.work_s(self.spot(row), blocks)
        work_s += fleet.prefill_offset_s
        return work_s

    def spot(self, row: int) -> Spot:
        """One worker, as it is now."""
        fleet = self._fleet
        return Spot(
            fleet.worker(row),
            fleet.node_numbers.item(row),
            self.queue_s.item(row),
            self._receives_s.item(row),
            fleet.load_factor.item(row),
            fleet.prefill_factor.item(row),
            fleet.prefill_offset_s.item(row),
        )

    def _groups(self) -> dict[int, int]:
        """By number of blocks the nodes that hold so many, and those that hold none."""
        nothing = (1 << self.prompt.view.prefixes.num_numbers) - 1
        for nodes in self.prompt.held.groups.values():
            nothing ^= nodes
        return {0: nothing, **self.prompt.held.groups}

    def _work_of(self, blocks: int, rows: Rows | slice) -> Floats:
        """The work where so many blocks are held, by the fastest way, but for the workers' offsets."""
        fleet, receives_s = self._fleet, self._receives_s[rows]
        load_factor, prefill_factor = fleet.load_factor[rows], fleet.prefill_factor[rows]
        ways = self.prompt.ways(blocks)
        return reduce(np.minimum, [_way_s(way, load_factor, prefill_factor, receives_s) for way in ways])


def _way_s(way: PrefillWay, load_factor: Floats, prefill_factor: Floats, receives_s: Floats) -> Floats:
    """One way's work on many workers."""
    work_s = way.cached_s(load_factor, prefill_factor)
    if way.source:
        work_s += np.maximum(receives_s, way.wait_s)
        work_s += way.transfer_s
    return work_s
