"""Acquires: all that a prompt needs of the arena is taken at once, and then what of its prefix is on SSD is loaded."""

from collections.abc import Collection
from functools import partial

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.index import BlockIndex, Coming
from perigee.kvstore.limits import Totals
from perigee.kvstore.messages import Acquired, Tier
from perigee.kvstore.moves import Moves
from perigee.kvstore.tiers import Tiers
from perigee.kvstore.waiting import Acquire, Answer


class Acquires:
    """Those that have all slots they need and wait for loads. Counts hits and misses of those that are answered."""

    def __init__(self, index: BlockIndex, tiers: Tiers, moves: Moves, totals: Totals) -> None:
        self._index = index
        self._tiers = tiers
        self._moves = moves
        self._totals = totals
        self._loading: dict[Acquire, None] = {}

    def all(self) -> Collection[Acquire]:
        """Those that wait for loads."""
        return self._loading.keys()

    def begin(self, request: Acquire, now: float) -> list[Answer] | None:
        """Takes all that it needs, or nothing and says None."""
        self._index.revive(request.keys, now)
        below = self._tiers.to_load(request.keys)
        free_up = partial(self._tiers.free_up, drop_at=request.drop_at, now=now)
        if not below:
            acquired = self._index.acquire(request.caller.group, request.keys, request.parent, now, free_up=free_up)
            return None if acquired is None else [self._answer(request, acquired)]
        coming = Coming(self._tiers.prefix(request.keys), sum(not self._moves.is_loading(key) for key in below))
        hold = self._moves.new_group()
        acquired = self._index.acquire(hold, request.keys, request.parent, now, coming, free_up)
        if acquired is None:
            self._index.release(hold)
            return None
        request.hold, request.reserved = hold, acquired.reserved
        request.leased = {block.index: block for block in acquired.leased}
        request.loading = below
        self._loading[request] = None
        for key in below:
            self._tiers.load(key)
        return []

    def load_ended(self, key: BlockKey, now: float) -> tuple[list[Answer], list[Acquire]]:
        """What that means for those that waited for it: the answers for whom it was the last, and those that have to
        begin again, for it turned out not to be there.
        """
        answers, failed = [], []
        for request in [request for request in self._loading if key in request.loading]:
            assert request.hold is not None
            came = self._index.lease(request.hold, [(request.loading.pop(key), key)], now, Tier.SSD)
            request.leased |= {block.index: block for block in came}
            if not came:
                self.give_up(request)
                failed.append(request)
            elif not request.loading:
                answers.append(self._hand_over(request))
        return answers, failed

    def give_up(self, request: Acquire) -> None:
        """Gives back what it has. Does nothing if it has nothing."""
        self._loading.pop(request, None)
        if request.hold is not None:
            self._index.release(request.hold)
            request.hold = None

    def _hand_over(self, request: Acquire) -> Answer:
        """All that it waited for is here: its caller's from now on."""
        assert request.hold is not None
        del self._loading[request]
        self._index.merge(request.hold, request.caller.group)
        leased = tuple(request.leased[index] for index in sorted(request.leased))
        return self._answer(request, Acquired(leased, request.reserved))

    def _answer(self, request: Acquire, acquired: Acquired) -> Answer:
        self._totals.hit_blocks += len(acquired.leased)
        self._totals.hit_ssd_blocks += sum(1 for block in acquired.leased if block.tier is Tier.SSD)
        self._totals.miss_blocks += len(acquired.reserved)
        return Answer(request.caller, acquired)
