"""Which block is where, in which state, and leased by whom: a synchronous state machine over slot numbers and keys.

A slot is free, reserved (one group may write it) or holds a committed block. A committed block is *pinned* while a
group leases it or a resident descendant of it is pinned: descendants go first, so it could not be evicted then. All
other blocks can be, one after the other, which makes `room` exact and a reservation of many slots all or nothing.
"""

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from perigee.kvstore.blocks import DECODE, PREFILL, BlockKey
from perigee.kvstore.errors import InvalidRequest
from perigee.kvstore.evict import EvictionPolicy
from perigee.kvstore.messages import Acquired, BlockEvent, CommittedBlock, LeasedBlock, Reservation


class GroupId(NamedTuple):
    """Leases and reservations that end together: a group of a connection, or both with the connection."""

    connection: int
    group: int


@dataclass(slots=True)
class Block:
    """A committed block. `leases` counts the groups that hold it."""

    key: BlockKey
    parent: BlockKey
    slot: int
    num_tokens: int
    origin: int
    leases: int = 0


@dataclass(frozen=True, slots=True)
class _Reserved:
    key: BlockKey
    parent: BlockKey
    nonce: int


@dataclass(slots=True)
class _Group:
    leases: set[BlockKey] = field(default_factory=set)
    reserved: dict[int, _Reserved] = field(default_factory=dict)  # by slot


class BlockIndex:
    """The blocks of an arena of `num_slots` slots, each block of at most `block_tokens` tokens.

    Everything here is owned and filled by the index alone. `now` is any clock that never goes back.
    """

    def __init__(self, num_slots: int, block_tokens: int, policy: EvictionPolicy) -> None:
        self.num_slots = num_slots
        self.num_leased = 0  # blocks with at least one lease
        self.num_reserved = 0
        self.stored_total = 0
        self.evicted_total = 0
        self._block_tokens = block_tokens
        self._policy = policy
        self._blocks: dict[BlockKey, Block] = {}
        self._groups: dict[GroupId, _Group] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._nonces = itertools.count(1)
        self._events: list[BlockEvent] = []
        # By parent key, whether or not the parent itself is resident; no zeros are kept.
        self._children: dict[BlockKey, int] = {}
        self._pinned_children: dict[BlockKey, int] = {}
        self._num_pinned = 0

    # ---- what is here --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._blocks)

    def committed_keys(self) -> Collection[BlockKey]:
        """The keys of all committed blocks, parents not necessarily before children."""
        return self._blocks.keys()

    def lookup(self, keys: Iterable[BlockKey]) -> list[bool]:
        """Which of `keys` are committed. Extends nothing."""
        blocks = self._blocks
        return [key in blocks for key in keys]

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def room(self) -> int:
        """Slots that could be reserved now, after evicting all that may go."""
        return len(self._free) + len(self._blocks) - self._num_pinned

    def orphaned(self, living: Collection[int]) -> int:
        """Leases and reservations of connections that are not among `living`."""
        gone = (group for group_id, group in self._groups.items() if group_id.connection not in living)
        return sum(len(group.leases) + len(group.reserved) for group in gone)

    def groups_of(self, connection: int) -> list[GroupId]:
        return [group_id for group_id in self._groups if group_id.connection == connection]

    def take_events(self) -> list[BlockEvent]:
        """What changed since the last call, in order."""
        events, self._events = self._events, []
        return events

    # ---- leases and reservations ---------------------------------------------------------------------------------

    def acquire(self, group_id: GroupId, keys: Sequence[BlockKey], parent: BlockKey, now: float) -> Acquired | None:
        """Leases the longest committed prefix of `keys`, which follow `parent`, and reserves a slot for each key after.

        None, with nothing changed, when there is no room now.
        """
        group = self._groups.setdefault(group_id, _Group())
        hits = self._committed_prefix(keys)
        added = [block for block in hits if self._lease(group, block)]
        if len(keys) - len(hits) > self.room:
            for block in added:
                self._unlease(group, block)
            return None
        for block in hits:
            self._policy.use(block.key, now)
        leased = tuple(_leased(index, block) for index, block in enumerate(hits))
        return Acquired(leased, self._reserve(group, keys, parent, len(hits)))

    def lease(self, group_id: GroupId, wanted: Iterable[tuple[int, BlockKey]], now: float) -> list[LeasedBlock]:
        """Leases those of `wanted`, pairs of index and key, that are committed."""
        group = self._groups.setdefault(group_id, _Group())
        leased = []
        for index, key in wanted:
            if block := self._blocks.get(key):
                self._lease(group, block)
                self._policy.use(key, now)
                leased.append(_leased(index, block))
        return leased

    def commit(self, group_id: GroupId, blocks: Sequence[CommittedBlock], now: float) -> list[BlockKey]:
        """Makes reserved slots readable, all or none; answers with the keys that are committed for the first time.

        Of several reservations of one key the first commit wins: the slot of a later one becomes free, and its group
        gets a lease on the winner's block instead. Raises InvalidRequest if one of them is not the group's to commit.
        """
        group = self._groups.get(group_id, _Group())
        self._check_commit(group, blocks)
        return [key for block in blocks if (key := self._commit(group, block, now))]

    def release(self, group_id: GroupId) -> None:
        """Ends the group's leases and reservations. No effect on a group that has none."""
        group = self._groups.pop(group_id, None)
        if group is None:
            return
        for key in list(group.leases):
            self._unlease(group, self._blocks[key])
        self.num_reserved -= len(group.reserved)
        self._free.extend(group.reserved)

    def _committed_prefix(self, keys: Sequence[BlockKey]) -> list[Block]:
        hits = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            hits.append(block)
        return hits

    def _reserve(
        self, group: _Group, keys: Sequence[BlockKey], parent: BlockKey, first: int
    ) -> tuple[Reservation, ...]:
        """Reserves `keys[first:]`. There is room for them."""
        reserved = []
        for index in range(first, len(keys)):
            slot, nonce = self._take_slot(), next(self._nonces)
            group.reserved[slot] = _Reserved(keys[index], keys[index - 1] if index else parent, nonce)
            reserved.append(Reservation(index, slot, nonce))
        self.num_reserved += len(reserved)
        return tuple(reserved)

    def _check_commit(self, group: _Group, blocks: Sequence[CommittedBlock]) -> None:
        for block in blocks:
            reserved = group.reserved.get(block.slot)
            if reserved is None or reserved.nonce != block.nonce:
                raise InvalidRequest(f"slot {block.slot}, nonce {block.nonce}: not a reservation of this group")
            if not 1 <= block.num_tokens <= self._block_tokens:
                raise InvalidRequest(f"num_tokens: {block.num_tokens}; allowed are 1 to {self._block_tokens}")
            if block.origin not in (PREFILL, DECODE):
                raise InvalidRequest(f"origin: {block.origin}; allowed are {PREFILL} (prefill) and {DECODE} (decode)")
        if len({block.slot for block in blocks}) != len(blocks):
            raise InvalidRequest("blocks: a slot is committed twice")

    def _commit(self, group: _Group, committed: CommittedBlock, now: float) -> BlockKey | None:
        reserved = group.reserved.pop(committed.slot)
        self.num_reserved -= 1
        block = self._blocks.get(reserved.key)
        if block is not None:
            self._free.append(committed.slot)
            self._lease(group, block)
            return None
        block = Block(reserved.key, reserved.parent, committed.slot, committed.num_tokens, committed.origin)
        self._insert(block)
        self._lease(group, block)
        self._policy.use(block.key, now)
        return block.key

    # ---- residency -----------------------------------------------------------------------------------------------

    def _insert(self, block: Block) -> None:
        self._blocks[block.key] = block
        self._children[block.parent] = self._children.get(block.parent, 0) + 1
        self._policy.forbid(block.parent)
        if block.key in self._pinned_children:
            self._pin(block)
        self.stored_total += 1
        self._events.append(BlockEvent(True, block.key))

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        victim = self._policy.pop()
        assert victim is not None, "room was counted before"
        return self._evict(self._blocks[victim])

    def _evict(self, block: Block) -> int:
        """Forgets a block without lease or children, and returns its slot."""
        del self._blocks[block.key]
        if _decrement(self._children, block.parent) == 0:
            self._allow_if_evictable(self._blocks.get(block.parent))
        self.evicted_total += 1
        self._events.append(BlockEvent(False, block.key))
        return block.slot

    def _allow_if_evictable(self, block: Block | None) -> None:
        if block and not block.leases and block.key not in self._children:
            self._policy.allow(block.key, partial=block.num_tokens < self._block_tokens)

    # ---- leases of one block, and pins ---------------------------------------------------------------------------

    def _lease(self, group: _Group, block: Block) -> bool:
        """Whether the group did not hold it before."""
        if block.key in group.leases:
            return False
        group.leases.add(block.key)
        block.leases += 1
        if block.leases == 1:
            self.num_leased += 1
            self._policy.forbid(block.key)
            if block.key not in self._pinned_children:
                self._pin(block)
        return True

    def _unlease(self, group: _Group, block: Block) -> None:
        group.leases.remove(block.key)
        block.leases -= 1
        if block.leases == 0:
            self.num_leased -= 1
            if block.key not in self._pinned_children:
                self._unpin(block)
            self._allow_if_evictable(block)

    def _pin(self, block: Block) -> None:
        """`block` just became pinned, and with it those ancestors that were not: O(1) amortized along a chain."""
        pinned: Block | None = block
        while pinned:
            self._num_pinned += 1
            siblings = self._pinned_children.get(pinned.parent, 0)
            self._pinned_children[pinned.parent] = siblings + 1
            parent = self._blocks.get(pinned.parent)
            pinned = parent if parent and not siblings and not parent.leases else None

    def _unpin(self, block: Block) -> None:
        """The reverse of `_pin`."""
        unpinned: Block | None = block
        while unpinned:
            self._num_pinned -= 1
            siblings = _decrement(self._pinned_children, unpinned.parent)
            parent = self._blocks.get(unpinned.parent)
            unpinned = parent if parent and not siblings and not parent.leases else None


def _leased(index: int, block: Block) -> LeasedBlock:
    return LeasedBlock(index, block.slot, block.num_tokens, block.origin)


def _decrement(counts: dict[BlockKey, int], key: BlockKey) -> int:
    """Counts one down and keeps no zero; returns what is left."""
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]
    return left
