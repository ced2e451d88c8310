"""Blocks on their way: from SSD or another node into the arena, and from the arena to SSD.

Each move holds its slot in a group of the node's own until its job has ended, so a slot that is being written is never
reused and a block that is being read is never evicted. What comes is committed like what a worker wrote; the group then
keeps it until `settle`, by when whoever waited for it has a lease of its own.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.errors import InvalidRequest
from perigee.kvstore.holdings import NODE, Block, GroupId
from perigee.kvstore.index import BlockIndex
from perigee.kvstore.jobs import CancelPull, Expected, Job, Load, Pull, Spill
from perigee.kvstore.messages import CommittedBlock
from perigee.kvstore.records import Location, Record


class PulledBlock(NamedTuple):
    """A block that lies whole in its slot, by its place in what a pull was to bring."""

    place: int
    num_tokens: int
    origin: int


class _Load(NamedTuple):
    group: GroupId
    incoming: Expected
    location: Location


@dataclass(slots=True)
class Pulling:
    """A pull under way. `expected` are, by place, the blocks that have not come yet; `group` has their slots."""

    job: int
    group: GroupId
    source: str
    deadline: float
    expected: dict[int, Expected] = field(default_factory=dict)
    cancelled: bool = False

    @property
    def keys(self) -> list[BlockKey]:
        return [incoming.key for incoming in self.expected.values()]

    def may_repeat(self, source: str, deadline: float, broken: bool) -> bool:
        """Whether who waits until `deadline` should pull from `source` what this pull, which has ended, did not bring:
        if that is another node, or the wait would have been longer.
        """
        if not source:
            return False
        ended_early = self.cancelled or (not broken and deadline > self.deadline)
        return source != self.source or ended_early


@dataclass(frozen=True, slots=True)
class _Spilling:
    group: GroupId
    block: Block


class Moves:
    """What is under way in the arena of `index`, and the jobs that have not been taken to be carried out."""

    def __init__(self, index: BlockIndex) -> None:
        self._index = index
        self._numbers = itertools.count(1)
        self._jobs: list[Job] = []
        self._loads: dict[int, _Load] = {}
        self._pulls: dict[int, Pulling] = {}
        self._spills: dict[int, _Spilling] = {}
        self._loading: dict[BlockKey, int] = {}
        self._pulled_by: dict[BlockKey, Pulling] = {}
        self._ended: list[GroupId] = []
        self._arrived: list[tuple[GroupId, list[Expected]]] = []

    def take_jobs(self) -> list[Job]:
        """Those that were asked for since the last call, in order."""
        jobs, self._jobs = self._jobs, []
        return jobs

    def ask(self, job: Job) -> None:
        self._jobs.append(job)

    def new_group(self) -> GroupId:
        """A group of the node's own."""
        return GroupId(NODE, next(self._numbers))

    @property
    def num_spills(self) -> int:
        return len(self._spills)

    @property
    def is_idle(self) -> bool:
        return not (self._loads or self._pulls or self._spills)

    def idle(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """Those of `keys` that are neither being loaded nor pulled."""
        return [key for key in keys if key not in self._loading and key not in self._pulled_by]

    # ---- from SSD ------------------------------------------------------------------------------------------------

    def is_loading(self, key: BlockKey) -> bool:
        return key in self._loading

    def load(self, record: Record, location: Location) -> None:
        """Begins to load a block. There must be room for it."""
        job, group = next(self._numbers), self.new_group()
        (reservation,) = self._index.reserve(group, [(record.key, record.parent)])
        incoming = Expected(record.key, reservation.slot, reservation.nonce)
        self._loads[job] = _Load(group, incoming, location)
        self._loading[record.key] = job
        self._jobs.append(Load(job, record.key, reservation.slot, location))

    def give_up_loads(self) -> list[BlockKey]:
        """What the loads under way were to bring, which does not count as coming any more. They keep their slots."""
        keys = list(self._loading)
        self._loading.clear()
        return keys

    def loaded(self, job: int, record: Record | None, now: float) -> tuple[BlockKey, Location, bool]:
        """What was loaded from where, and whether it came. None stands for a record that could not be read."""
        group, incoming, location = self._loads.pop(job)
        self._loading.pop(incoming.key, None)
        self._ended.append(group)
        came = record is not None and self._commit(group, [_whole(incoming, record.num_tokens, record.origin)], now)
        return incoming.key, location, came

    # ---- from another node ---------------------------------------------------------------------------------------

    def pulled_by(self, key: BlockKey) -> Pulling | None:
        """The pull that is to bring this block."""
        return self._pulled_by.get(key)

    def pull(self, source: str, wanted: Sequence[tuple[BlockKey, BlockKey]], wait_s: float, now: float) -> None:
        """Begins to pull blocks, pairs of key and parent. There must be room for them."""
        pulling = Pulling(next(self._numbers), self.new_group(), source, now + wait_s)
        reservations = self._index.reserve(pulling.group, wanted)
        expected = tuple(
            [Expected(key, slot.slot, slot.nonce) for (key, _), slot in zip(wanted, reservations, strict=True)]
        )
        pulling.expected.update(enumerate(expected))
        self._pulled_by.update(dict.fromkeys([key for key, _ in wanted], pulling))
        self._pulls[pulling.job] = pulling
        self._jobs.append(Pull(pulling.job, source, expected, wait_s))

    def pulled(self, job: int, blocks: Iterable[PulledBlock], now: float) -> tuple[list[BlockKey], list[BlockKey]]:
        """The keys of blocks that a pull brought, and of those among them that are not what a block may be."""
        pulling = self._pulls[job]
        incoming, commits = [], []
        for place, num_tokens, origin in blocks:
            came = pulling.expected.pop(place)
            del self._pulled_by[came.key]
            incoming.append(came)
            commits.append(_whole(came, num_tokens, origin))
        self._arrived.append((pulling.group, incoming))
        if self._commit(pulling.group, commits, now):
            return [came.key for came in incoming], []
        # One of them at least is wrong.
        good = [self._commit(pulling.group, [commit], now) for commit in commits]
        keys = [came.key for came in incoming]
        return list(compress(keys, good)), [key for key, is_good in zip(keys, good, strict=True) if not is_good]

    def cancel(self, pulling: Pulling) -> None:
        if not pulling.cancelled:
            pulling.cancelled = True
            self._jobs.append(CancelPull(pulling.job))

    def pull_ended(self, job: int) -> Pulling:
        """The pull that ended, with what it did not bring."""
        pulling = self._pulls.pop(job)
        for incoming in pulling.expected.values():
            del self._pulled_by[incoming.key]
        self._ended.append(pulling.group)
        return pulling

    # ---- to SSD --------------------------------------------------------------------------------------------------

    def spill(self, victim: Block) -> None:
        """Begins to write a victim of the index to SSD."""
        job, group = next(self._numbers), self.new_group()
        self._index.leave(group, victim)
        self._spills[job] = _Spilling(group, victim)
        record = Record(victim.key, victim.parent, victim.num_tokens, victim.origin)
        self._jobs.append(Spill(job, victim.slot, record))

    def spilled(self, job: int) -> BlockKey:
        """What was spilled. It has left the arena, unless somebody wanted it meanwhile."""
        spilling = self._spills.pop(job)
        self._index.left(spilling.group, spilling.block)
        return spilling.block.key

    # ---- slots ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Lets go of the blocks that arrived, and of the slots of those that did not."""
        for group, incoming in self._arrived:
            self._index.let_go(group, [(came.key, came.slot) for came in incoming])
        self._arrived.clear()
        for group in self._ended:
            self._index.release(group)
        self._ended.clear()

    def _commit(self, group: GroupId, blocks: Sequence[CommittedBlock], now: float) -> bool:
        try:
            self._index.commit(group, blocks, now)
        except InvalidRequest:  # whole, but not a block of this node's model
            return False
        return True


def _whole(incoming: Expected, num_tokens: int, origin: int) -> CommittedBlock:
    return CommittedBlock(incoming.slot, incoming.nonce, num_tokens, origin)
