"""Where the blocks of a node are: in the arena, on SSD, or on the way from one to the other or from another node."""

from collections.abc import Sequence

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.holdings import Block
from perigee.kvstore.index import BlockIndex
from perigee.kvstore.jobs import DropSegment
from perigee.kvstore.limits import StoreLimits
from perigee.kvstore.messages import BlockEvent, Tier
from perigee.kvstore.moves import Moves
from perigee.kvstore.ssd_tier import SsdTier
from perigee.kvstore.waiting import Fetch


class Tiers:
    """Finds blocks in `index` and `ssd`, and has them moved. It owns no state but whether slots are being made free."""

    def __init__(self, index: BlockIndex, ssd: SsdTier | None, moves: Moves, limits: StoreLimits) -> None:
        self._index = index
        self._ssd = ssd
        self._moves = moves
        self._limits = limits
        self._reclaiming = False

    # ---- what is where -------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which of `keys` are here, in whichever tier. Extends nothing."""
        in_arena = self._index.lookup(keys)
        if self._ssd is None:
            return in_arena
        leaving = self._index.leaving()
        return [here or key in self._ssd or key in leaving for key, here in zip(keys, in_arena, strict=True)]

    def prefix(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the first on, are in some tier."""
        return next((index for index, here in enumerate(self.lookup(keys)) if not here), len(keys))

    def to_load(self, keys: Sequence[BlockKey]) -> dict[BlockKey, int]:
        """Those of the prefix that are on SSD alone, with their indices. None of `keys` is leaving."""
        if self._ssd is None:
            return {}
        prefix = keys[: self.prefix(keys)]
        in_arena = self._index.lookup(prefix)
        return {key: index for index, (key, here) in enumerate(zip(prefix, in_arena, strict=True)) if not here}

    def snapshot(self) -> list[BlockEvent]:
        """All that is here, as events."""
        in_arena = [BlockEvent(True, key) for key in {*self._index.committed_keys(), *self._index.leaving()}]
        on_ssd = self._ssd.keys() if self._ssd is not None else ()
        return in_arena + [BlockEvent(True, key, Tier.SSD) for key in on_ssd]

    def take_events(self) -> list[BlockEvent]:
        """What changed since the last call, in order by tier."""
        return [*(self._ssd.take_events() if self._ssd is not None else ()), *self._index.take_events()]

    # ---- into the arena ------------------------------------------------------------------------------------------

    def load(self, key: BlockKey) -> None:
        """Sees to it that a block that is on SSD comes into the arena. There is room for it."""
        assert self._ssd is not None
        if not self._moves.is_loading(key):
            self._moves.load(*self._ssd.begin_load(key))

    def slots_needed(self, request: Fetch) -> int:
        """For what is awaited, and not under way already."""
        loads, pulls = self._sources(request)
        return len(loads) + len(pulls)

    def bring(self, request: Fetch, now: float) -> bool:
        """Begins to load and pull what is awaited. False, with nothing begun, if there is no room for all of it."""
        loads, pulls = self._sources(request)
        needed = len(loads) + len(pulls)
        if needed > self._index.room or not self.free_up(needed, request.drop_at, now):
            return False
        for key in loads:
            self.load(key)
        if pulls:
            wanted = [(key, request.parent_of(request.awaited[key])) for key in pulls]
            self._moves.pull(request.source, wanted, max(0.0, request.deadline - now), now)
        return True

    def is_coming(self, request: Fetch, key: BlockKey) -> bool:
        """Whether the block is being brought, soon enough for the request. A pull for another may wait for longer."""
        pulling = self._moves.pulled_by(key)
        return self._moves.is_loading(key) or (pulling is not None and pulling.deadline <= request.deadline)

    def _sources(self, request: Fetch) -> tuple[list[BlockKey], list[BlockKey]]:
        """What of its awaited blocks must be loaded, and what pulled, that nobody loads or pulls already."""
        idle = self._moves.idle(request.awaited)
        on_ssd = {key for key in idle if key in self._ssd} if self._ssd is not None else ()
        pulls = [key for key in idle if key not in on_ssd] if request.source else []
        return [key for key in idle if key in on_ssd], pulls

    # ---- out of the arena ----------------------------------------------------------------------------------------

    def drop(self, keys: Sequence[BlockKey]) -> int:
        """Gives up those of `keys` that nobody holds, in both tiers; returns how many were in any. What stays in the
        arena, for somebody holds it or a block that follows it is there, stays on SSD, too.
        """
        dropped = set(self._index.drop(keys))
        if self._ssd is not None:
            for key in keys:
                if not self._index.block(key) and not self._moves.is_loading(key) and self._ssd.drop(key):
                    dropped.add(key)
        return len(dropped)

    def free_up(self, num_slots: int, drop_at: float, now: float) -> bool:
        """Whether so many slots can be taken now, though the index may have to drop blocks for them.

        Before `drop_at` they can once they are free: until then what is worth it of the blocks that must leave is being
        written to SSD.
        """
        if self._ssd is None or self._ssd.is_off or now >= drop_at:
            return True
        while self._coming_free < num_slots and (victim := self._index.victim()):
            self._give_up(victim)
        return self._index.free_slots >= num_slots

    def reclaim(self) -> None:
        """Gives up blocks before their slots are needed, as long as there is an SSD that may want them."""
        if self._ssd is None or self._ssd.is_off:
            return
        self._reclaiming = self._coming_free < (self._limits.free_high if self._reclaiming else self._limits.free_low)
        while self._reclaiming and self._moves.num_spills < self._limits.spills and (victim := self._index.victim()):
            self._give_up(victim)
            self._reclaiming = self._coming_free < self._limits.free_high
        for segment in self._ssd.segments_to_drop():
            self._moves.ask(DropSegment(segment))

    def _give_up(self, victim: Block) -> None:
        assert self._ssd is not None
        if self._ssd.begin_spill(victim):
            self._moves.spill(victim)
        else:
            self._index.evict(victim)

    @property
    def _coming_free(self) -> int:
        return self._index.free_slots + self._moves.num_spills
