"""What prefilling a prompt would come to, on one worker or on many at once.

It depends on how many blocks a worker's own store node holds, and on what can be fetched from others. Most workers hold
equally many, mostly none or a beginning that all prompts share, so the ways to go are worked out once for each number
of blocks. What then differs between workers is how long their queues are, and how far they are from the profile.
"""

from functools import reduce
from typing import Protocol

import numpy as np

from perigee.scheduler.cost import WorkerCost
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.fleet import Floats
from perigee.scheduler.plan import PrefillEstimate, PrefillWay
from perigee.scheduler.prefixes import Match, flags, positions
from perigee.scheduler.view import ClusterView

# So few workers are looked at one by one.
_FEW = 4


class Prompt:
    """A prompt, what the cluster holds of it, and the ways to prefill it."""

    def __init__(self, view: ClusterView, request: RequestArrived, now: float) -> None:
        assert view.card is not None
        self.view = view
        self.num_tokens = request.num_tokens
        self.block_tokens = view.card.block_tokens
        self.held: Match = view.prefixes.match(request.block_keys)
        self.queue_s = view.fleet.queue_s(view.ranks.preview(request), now)
        self.receiving = view.transfers.receiving(now)
        self._now = now

    def promote_s(self, number: int) -> float:
        """How long a node takes to read what it has of the prompt on SSD alone."""
        blocks = self.held.ssd_blocks.get(number, 0) if self.held.ssd_blocks else 0
        return self.view.profile.promote_s(float(blocks * self.block_tokens)) if blocks else 0.0

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


class FetchRule(Protocol):
    """Says which ways there are to prefill a prompt."""

    def ways(self, prompt: Prompt, local_blocks: int) -> list[PrefillWay]:
        """Where so many blocks are held; at least one."""
        ...


class PrefillOptions:
    """The fastest way for each worker, among those that a rule allows."""

    def __init__(self, prompt: Prompt, rule: FetchRule) -> None:
        self.prompt = prompt
        self._rule = rule
        self._ways: dict[int, list[PrefillWay]] = {}  # by number of blocks held
        self._fleet = prompt.view.fleet

    def work_s(self) -> Floats:
        """What each worker has to do with the prompt, by row of the fleet."""
        prompt, fleet, groups = self.prompt, self._fleet, self._groups()
        usual = max(groups, key=lambda blocks: groups[blocks].bit_count())
        work_s = self._work_of(usual, fleet.load_factor, fleet.prefill_factor)
        one_by_one = {number: prompt.held.blocks(number) for number in (*prompt.held.ssd_blocks, *prompt.receiving)}
        for blocks, nodes in groups.items():
            if blocks == usual:
                continue
            if nodes.bit_count() <= _FEW:
                one_by_one.update(dict.fromkeys(positions(nodes), blocks))
            else:
                rows = np.flatnonzero(flags(nodes, prompt.view.prefixes.num_numbers + 1)[fleet.node_numbers])
                work_s[rows] = self._work_of(blocks, fleet.load_factor[rows], fleet.prefill_factor[rows])
        work_s += fleet.prefill_offset_s
        for number, blocks in one_by_one.items():
            for row in fleet.rows_at.get(number, ()):
                work_s[row] = self._best(fleet.worker(row).cost, number, blocks)[0]
        return work_s

    def estimate(self, row: int) -> PrefillEstimate:
        """What it comes to on one worker."""
        prompt, worker, number = self.prompt, self._fleet.worker(row), int(self._fleet.node_numbers[row])
        _, way, wait_s = self._best(worker.cost, number, prompt.held.blocks(number))
        return PrefillEstimate(
            worker,
            way,
            float(prompt.queue_s[row]),
            wait_s,
            prompt.promote_s(number),
            prompt.held.ssd_blocks.get(number, 0) * prompt.block_tokens,
            worker.cost.load.factor,
            worker.cost.prefill.factor,
            worker.cost.prefill.offset_s,
        )

    def _best(self, cost: WorkerCost, number: int, blocks: int) -> tuple[float, PrefillWay, float]:
        """The work on one worker, whose store node has this number and holds so many blocks; the way, and how long its
        transfer waits.
        """
        receives_s = self.prompt.receiving.get(number, 0.0)
        choices: list[tuple[float, int, PrefillWay, float]] = []
        for way in self._ways_of(blocks):
            wait_s = max(way.wait_s, receives_s) if way.source else 0.0
            work_s = way.work_s(cost.load.factor, cost.prefill.factor)
            choices.append((work_s + wait_s - way.wait_s, len(choices), way, wait_s))
        work_s, _, way, wait_s = min(choices)
        return work_s + cost.prefill.offset_s + self.prompt.promote_s(number), way, wait_s

    def _groups(self) -> dict[int, int]:
        """By number of blocks the nodes that hold so many, and those that hold none."""
        nothing = (1 << self.prompt.view.prefixes.num_numbers) - 1
        for nodes in self.prompt.held.groups.values():
            nothing ^= nodes
        return {0: nothing, **self.prompt.held.groups}

    def _work_of(self, blocks: int, load_factor: Floats, prefill_factor: Floats) -> Floats:
        return reduce(np.minimum, [way.work_s(load_factor, prefill_factor) for way in self._ways_of(blocks)])

    def _ways_of(self, blocks: int) -> list[PrefillWay]:
        ways = self._ways.get(blocks)
        if ways is None:
            ways = self._ways[blocks] = self._rule.ways(self.prompt, blocks)
        return ways
