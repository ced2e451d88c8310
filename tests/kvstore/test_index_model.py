"""The index beside a plain model of it, under any sequence of operations."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from perigee.kvstore.blocks import PREFILL, BlockKey
from perigee.kvstore.evict import LRU
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.index import BlockIndex
from perigee.kvstore.messages import CommittedBlock
from tests.kvstore.keys import ROOT, chain, key

NUM_SLOTS = 6
FULL = 4

# Paths in a small forest: equal prefixes meet, and a path may start in the middle, its parent resident or not.
paths = st.text("ab", min_size=1, max_size=4)
PUTTING = GroupId(1, 9)
groups = st.builds(GroupId, st.integers(1, 2), st.integers(1, 2))


@dataclass
class ModelBlock:
    parent: BlockKey
    slot: int
    partial: bool
    last_used: float
    holders: set[GroupId] = field(default_factory=set)


def keys_of(path: str, start: int) -> tuple[list[BlockKey], BlockKey]:
    """The keys of `path` from `start`, and the key before them."""
    return [key(path[: end + 1]) for end in range(start, len(path))], key(path[:start]) if start else ROOT


class IndexAndModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(NUM_SLOTS, FULL, LRU())
        self.now = 0.0
        self.blocks: dict[BlockKey, ModelBlock] = {}
        self.reserved: dict[int, tuple[GroupId, BlockKey, BlockKey, int]] = {}  # slot: group, key, parent, nonce
        self.watched: set[BlockKey] = set()

    # ---- operations ----------------------------------------------------------------------------------------------

    @rule(group=groups, path=paths, start=st.integers(0, 4))
    def acquire(self, group: GroupId, path: str, start: int) -> None:
        self.now += 1
        keys, parent = keys_of(path, min(start, len(path) - 1))
        hits = next((i for i, k in enumerate(keys) if k not in self.blocks), len(keys))
        room = self._room(extra_leases=set(keys[:hits]))
        acquired = self.index.acquire(group, keys, parent, self.now)
        assert (acquired is not None) == (len(keys) - hits <= room)
        if acquired is None:
            assert self.index.take_events() == []
            return
        assert [block.slot for block in acquired.leased] == [self.blocks[k].slot for k in keys[:hits]]
        for leased in keys[:hits]:
            self._lease(group, leased)
        self._follow_events()
        assert [r.index for r in acquired.reserved] == list(range(hits, len(keys)))
        for r in acquired.reserved:
            assert r.slot not in self.reserved
            self.reserved[r.slot] = (group, keys[r.index], ([parent, *keys])[r.index], r.nonce)

    @rule(group=groups, path=paths, start=st.integers(0, 4))
    def lease(self, group: GroupId, path: str, start: int) -> None:
        self.now += 1
        keys, _ = keys_of(path, min(start, len(path) - 1))
        leased = self.index.lease(group, enumerate(keys), self.now)
        assert [block.index for block in leased] == [i for i, k in enumerate(keys) if k in self.blocks]
        for block in leased:
            self._lease(group, keys[block.index])

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), full=st.booleans())
    def commit(self, data: st.DataObject, full: bool) -> None:
        group = data.draw(st.sampled_from(sorted({entry[0] for entry in self.reserved.values()})))
        own = sorted(slot for slot, entry in self.reserved.items() if entry[0] == group)
        self._commit(group, data.draw(st.lists(st.sampled_from(own), min_size=1, unique=True)), full)

    def _commit(self, group: GroupId, slots: list[int], full: bool) -> None:
        self.now += 1
        num_tokens = FULL if full else 1
        commits = [CommittedBlock(slot, self.reserved[slot][3], num_tokens, PREFILL) for slot in slots]
        stored = self.index.commit(group, commits, self.now)
        expected = []
        for slot in slots:
            _, block_key, parent, _ = self.reserved.pop(slot)
            if block_key not in self.blocks:
                self.blocks[block_key] = ModelBlock(parent, slot, not full, self.now)
                expected.append(block_key)
            self.blocks[block_key].holders.add(group)
        assert stored == expected
        self._follow_events()

    @rule(path=paths)
    def put(self, path: str) -> None:
        """A whole prompt at once, kept without lease."""
        self.acquire(PUTTING, path, 0)
        self._commit(PUTTING, [slot for slot, entry in self.reserved.items() if entry[0] == PUTTING], full=True)
        self.release(PUTTING)

    @rule(group=groups)
    def release(self, group: GroupId) -> None:
        self.index.release(group)
        for block in self.blocks.values():
            block.holders.discard(group)
        self.reserved = {slot: entry for slot, entry in self.reserved.items() if entry[0] != group}

    @rule(asked=st.lists(paths, max_size=6, unique=True))
    def drop(self, asked: list[str]) -> None:
        keys = [key(path) for path in asked]
        wanted = {k for k in keys if k in self.blocks and not self.blocks[k].holders}
        while kept := {
            k for k in wanted if any(b.parent == k for other, b in self.blocks.items() if other not in wanted)
        }:
            wanted -= kept
        dropped = self.index.drop(keys)
        assert set(dropped) == wanted and len(dropped) == len(wanted)
        assert [(event.stored, event.key) for event in self.index.take_events()] == [(False, k) for k in dropped]
        for k in dropped:
            assert all(block.parent != k for block in self.blocks.values())
            del self.blocks[k]
        self.watched -= wanted

    def teardown(self) -> None:
        """Once nobody holds anything, everything can go."""
        for connection in (1, 2):
            for group in self.index.groups_of(connection):
                self.release(group)
        self.now += 1
        last = GroupId(3, 1)
        acquired = self.index.acquire(last, chain("last", NUM_SLOTS), ROOT, self.now)
        assert acquired and len(acquired.reserved) == NUM_SLOTS
        self._follow_events()
        assert not self.blocks

    # ---- the model -----------------------------------------------------------------------------------------------

    def _lease(self, group: GroupId, leased: BlockKey) -> None:
        self.blocks[leased].holders.add(group)
        self.blocks[leased].last_used = self.now

    def _room(self, extra_leases: set[BlockKey]) -> int:
        """Free slots, and blocks that neither are leased nor have a leased descendant."""
        kept = {k for k, block in self.blocks.items() if block.holders or k in extra_leases}
        while more := {self.blocks[k].parent for k in kept} & self.blocks.keys() - kept:
            kept |= more
        return NUM_SLOTS - len(self.reserved) - len(kept)

    def _evictable(self) -> dict[BlockKey, tuple[bool, float]]:
        parents = {block.parent for block in self.blocks.values()}
        return {
            k: (not block.partial, block.last_used)
            for k, block in self.blocks.items()
            if not block.holders and k not in parents
        }

    def _follow_events(self) -> None:
        """Evictions are those the model allows, in an order it allows; what was stored it has already."""
        for event in self.index.take_events():
            if event.stored:
                self.watched.add(event.key)
                continue
            candidates = self._evictable()
            assert candidates[event.key] == min(candidates.values())
            del self.blocks[event.key]
            self.watched.remove(event.key)

    # ---- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def they_agree(self) -> None:
        assert set(self.index.committed_keys()) == self.blocks.keys() == self.watched
        assert self.index.num_reserved == len(self.reserved)
        assert self.index.num_leased == sum(1 for block in self.blocks.values() if block.holders)
        assert self.index.free_slots == NUM_SLOTS - len(self.blocks) - len(self.reserved)
        assert self.index.room == self._room(extra_leases=set())

    @invariant()
    def no_slot_is_used_twice(self) -> None:
        slots = [block.slot for block in self.blocks.values()] + list(self.reserved)
        assert len(set(slots)) == len(slots)
        assert set(slots) <= set(range(NUM_SLOTS))

    @invariant()
    def every_lease_has_an_owner(self) -> None:
        holdings = sum(len(block.holders) for block in self.blocks.values()) + len(self.reserved)
        assert self.index.orphaned(set()) == holdings
        assert self.index.orphaned({1, 2}) == 0


IndexAndModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestIndexAgainstModel = IndexAndModel.TestCase
