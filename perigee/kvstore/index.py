"""Which block is where, in which state, and leased by whom: a synchronous state machine over slot numbers and keys.

A slot is free, reserved (one group may write it) or holds a committed block. A committed block is *pinned* while a
group leases it or a resident descendant of it is pinned: descendants go first, so it could not be evicted then. All
other blocks can be, one after the other, which makes `room` exact and a reservation of many slots all or nothing.

The store's own I/O holds blocks and slots as a worker's requests do, in groups of the connection `NODE`.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from perigee.kvstore.blocks import DECODE, PREFILL, BlockKey
from perigee.kvstore.errors import Fenced, InvalidRequest
from perigee.kvstore.evict import EvictionPolicy
from perigee.kvstore.holdings import NODE, Block, GroupId
from perigee.kvstore.lineage import Lineage
from perigee.kvstore.messages import Acquired, BlockEvent, CommittedBlock, LeasedBlock, Reservation, Tier


class Coming(NamedTuple):
    """The first `prefix` keys of an acquire are here or on their way, and `spare` slots must be left for the latter."""

    prefix: int
    spare: int


_ORIGINS = (PREFILL, DECODE)

_Reserved = tuple[BlockKey, BlockKey, int, float]
"""Key, parent, nonce and deadline. There is one for each block that comes, and nothing is made sooner than a tuple."""


@dataclass(slots=True)
class _Group:
    leases: dict[BlockKey, Block] = field(default_factory=dict)  # in order: that in which they end decides what leaves
    reserved: dict[int, _Reserved] = field(default_factory=dict)  # by slot


class BlockIndex:
    """The blocks of an arena of `num_slots` slots, each block of at most `block_tokens` tokens.

    A reservation may be committed for `reservation_s` seconds. Everything here is owned and filled by the index alone.
    `now` is any clock that never goes back.
    """

    def __init__(
        self, num_slots: int, block_tokens: int, policy: EvictionPolicy, reservation_s: float = math.inf
    ) -> None:
        self.num_slots = num_slots
        self.num_leased = 0  # blocks with at least one lease
        self.num_reserved = 0
        self.stored_total = 0
        self.evicted_total = 0
        self.fenced_total = 0  # commits refused because they came too late
        self._block_tokens = block_tokens
        self._reservation_s = reservation_s
        self._policy = policy
        self._blocks: dict[BlockKey, Block] = {}
        self._groups: dict[GroupId, _Group] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._nonces = itertools.count(1)
        self._events: list[BlockEvent] = []
        self._lineage = Lineage(policy, block_tokens)
        self._leaving: dict[BlockKey, tuple[Block, GroupId]] = {}  # being written elsewhere, and by what group

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
        return len(self._free) + len(self._blocks) - self._lineage.num_pinned

    def orphaned(self, living: Collection[int]) -> int:
        """Leases and reservations of connections that are not among `living`. The node's own have an owner."""
        gone = (
            group
            for group_id, group in self._groups.items()
            if group_id.connection != NODE and group_id.connection not in living
        )
        return sum(len(group.leases) + len(group.reserved) for group in gone)

    def num_overdue(self, now: float) -> int:
        """Slots whose reservation has ended, but which their writers have not released: somebody hangs."""
        reserved = (reserved for group in self._groups.values() for reserved in group.reserved.values())
        return sum(deadline < now for _, _, _, deadline in reserved)

    def block(self, key: BlockKey) -> Block | None:
        """The committed block of this key, which is the index's own."""
        return self._blocks.get(key)

    def groups_of(self, connection: int) -> list[GroupId]:
        return [group_id for group_id in self._groups if group_id.connection == connection]

    def take_events(self) -> list[BlockEvent]:
        """What changed since the last call, in order."""
        events, self._events = self._events, []
        return events

    # ---- leases and reservations ---------------------------------------------------------------------------------

    def acquire(
        self,
        group_id: GroupId,
        keys: Sequence[BlockKey],
        parent: BlockKey,
        now: float,
        coming: Coming | None = None,
        free_up: Callable[[int], bool] | None = None,
    ) -> Acquired | None:
        """Leases the longest committed prefix of `keys`, which follow `parent`, and reserves a slot for each key after.

        With `coming`, some blocks of the prefix are on their way into the arena. Where slots must be made free,
        `free_up` is told how many are needed and says whether they are, or may be taken from blocks that are dropped.
        None, with nothing leased or reserved, when there is no room now.
        """
        group = self._group(group_id)
        hits = self._committed(keys[: coming.prefix] if coming else keys[: self.prefix(keys)])
        blocks = [block for _, block in hits]
        prefix, spare = coming or Coming(len(hits), 0)
        added = self._lease(group, blocks)
        needed = len(keys) - prefix + spare
        if needed > self.room or (free_up and not free_up(needed)):
            self._unlease(group, added)
            return None
        self._use(blocks, now)
        leased = tuple([LeasedBlock(index, block.slot, block.num_tokens, block.origin) for index, block in hits])
        wanted = zip(range(prefix, len(keys)), keys[prefix:], (parent, *keys)[prefix:], strict=False)
        return Acquired(leased, tuple(self._reserve(group, wanted, now + self._reservation_s)))

    def reserve(self, group_id: GroupId, wanted: Iterable[tuple[BlockKey, BlockKey]]) -> list[Reservation]:
        """Slots for the node itself to fill, whenever it may, for pairs of key and parent. There must be room."""
        return self._reserve(self._group(group_id), ((0, key, parent) for key, parent in wanted), math.inf)

    def let_go(self, group_id: GroupId, parts: Iterable[tuple[BlockKey, int]]) -> None:
        """Ends a part of what a group has, pairs of key and slot: the lease on a block, or the reservation that was
        made for it.
        """
        group = self._groups.get(group_id)
        if group is None:
            return
        for key, slot in parts:
            if block := group.leases.get(key):
                self._unlease(group, [block])
            elif group.reserved.pop(slot, None):
                self.num_reserved -= 1
                self._free.append(slot)

    def merge(self, source_id: GroupId, target_id: GroupId) -> None:
        """All that one group holds is the other's from here on."""
        source = self._groups.pop(source_id)
        target = self._group(target_id)
        self._unlease(source, [block for key, block in source.leases.items() if key in target.leases])
        target.leases |= source.leases
        target.reserved |= source.reserved

    def lease(
        self,
        group_id: GroupId,
        wanted: Iterable[tuple[int, BlockKey]],
        now: float,
        tier: Tier = Tier.DRAM,
        remote: bool = False,
    ) -> list[LeasedBlock]:
        """Leases those of `wanted`, pairs of index and key, that are committed. `tier` and `remote` say where they come
        from.
        """
        here = [(index, block) for index, key in wanted if (block := self._blocks.get(key))]
        blocks = [block for _, block in here]
        self._lease(self._group(group_id), blocks)
        self._use(blocks, now)
        return [LeasedBlock(index, block.slot, block.num_tokens, block.origin, tier, remote) for index, block in here]

    def commit(self, group_id: GroupId, blocks: Sequence[CommittedBlock], now: float) -> list[BlockKey]:
        """Makes reserved slots readable, all or none; answers with the keys that are committed for the first time.

        Of several reservations of one key the first commit wins: the slot of a later one becomes free, and its group
        gets a lease on the winner's block instead. Raises InvalidRequest if one of them is not the group's to commit,
        Fenced if it is not any more: its slot stays the group's, for who knows what still writes there, until it is
        released.
        """
        group = self._groups.get(group_id) or _Group()
        self._check_commit(group, blocks, now)
        held, stored = [], []
        for committed in blocks:
            key, parent, _, _ = group.reserved.pop(committed.slot)
            block = self._blocks.get(key)
            if block:
                self._free.append(committed.slot)
            else:
                block = Block(key, parent, committed.slot, committed.num_tokens, committed.origin)
                self._insert(block)
                stored.append(block)
            held.append(block)
        self.num_reserved -= len(blocks)
        self._lease(group, held)
        self._use(stored, now)
        return [block.key for block in stored]

    def release(self, group_id: GroupId) -> None:
        """Ends the group's leases and reservations. No effect on a group that has none."""
        group = self._groups.pop(group_id, None)
        if group is None:
            return
        self._unlease(group, list(group.leases.values()))
        self.num_reserved -= len(group.reserved)
        self._free.extend(group.reserved)

    def prefix(self, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the first one on, are committed."""
        for index, key in enumerate(keys):
            if key not in self._blocks:
                return index
        return len(keys)

    def _committed(self, keys: Sequence[BlockKey]) -> list[tuple[int, Block]]:
        return [(index, block) for index, key in enumerate(keys) if (block := self._blocks.get(key))]

    def _reserve(
        self, group: _Group, wanted: Iterable[tuple[int, BlockKey, BlockKey]], deadline: float
    ) -> list[Reservation]:
        """Slots for index, key and parent of each. There is room for them."""
        reservations = []
        for index, key, parent in wanted:
            slot = self._free.pop() if self._free else self._evicted_slot()
            nonce = next(self._nonces)
            group.reserved[slot] = key, parent, nonce, deadline
            reservations.append(Reservation(index, slot, nonce))
        self.num_reserved += len(reservations)
        return reservations

    def _group(self, group_id: GroupId) -> _Group:
        group = self._groups.get(group_id)
        if group is None:
            group = self._groups[group_id] = _Group()
        return group

    def _check_commit(self, group: _Group, blocks: Sequence[CommittedBlock], now: float) -> None:
        for block in blocks:
            reserved = group.reserved.get(block.slot)
            if reserved is None or reserved[2] != block.nonce:
                raise InvalidRequest(f"slot {block.slot}, nonce {block.nonce}: not a reservation of this group")
            if reserved[3] < now:
                self.fenced_total += 1
                raise Fenced(f"slot {block.slot}: its reservation ended after {self._reservation_s} s")
            if not 1 <= block.num_tokens <= self._block_tokens:
                raise InvalidRequest(f"num_tokens: {block.num_tokens}; allowed are 1 to {self._block_tokens}")
            if block.origin not in _ORIGINS:
                raise InvalidRequest(f"origin: {block.origin}; allowed are {PREFILL} (prefill) and {DECODE} (decode)")
        if len({block.slot for block in blocks}) != len(blocks):
            raise InvalidRequest("blocks: a slot is committed twice")

    # ---- residency -----------------------------------------------------------------------------------------------

    def _insert(self, block: Block) -> None:
        self._blocks[block.key] = block
        self._lineage.enter(block, self._blocks.get(block.parent))
        self.stored_total += 1
        if block.key not in self._leaving:
            self._events.append(BlockEvent(True, block.key))

    def victim(self) -> Block | None:
        """The block to give up next, if any may go. The caller passes it to `evict` or `leave` at once."""
        key = self._policy.pop()
        return self._blocks[key] if key else None

    def evict(self, block: Block) -> None:
        """Gives up a victim."""
        self._remove(block)
        self._gone(block)

    def drop(self, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Gives up those of `keys` that nobody leases and that no other resident block follows, children first."""
        wanted, dropped = set(keys), []
        for first in keys:
            key = first
            while key in wanted and (block := self._blocks.get(key)) and not block.leases and not block.children:
                self._policy.remove(key)
                self.evict(block)
                dropped.append(key)
                key = block.parent
        return dropped

    def leave(self, group_id: GroupId, block: Block) -> None:
        """Gives up a victim whose slot is still read, and free when `left` says so. Until then `revive` is possible."""
        self._remove(block)
        self._leaving[block.key] = block, group_id

    def left(self, group_id: GroupId, block: Block) -> None:
        """Nobody reads the slot of a block that was to leave any more."""
        if self._leaving.get(block.key, (None, None))[1] != group_id:
            self.release(group_id)  # it was revived
            return
        del self._leaving[block.key]
        self._gone(block)

    def revive(self, keys: Iterable[BlockKey], now: float) -> None:
        """Keeps those of `keys` that were to leave, for somebody wants them. They cannot go before they have `left`."""
        if not self._leaving:
            return
        for key in keys:
            if key in self._leaving and key not in self._blocks:
                block, group_id = self._leaving[key]
                self._insert(block)
                del self._leaving[key]
                self._lease(self._group(group_id), [block])
                self._use([block], now)

    def leaving(self) -> Collection[BlockKey]:
        """The keys of the blocks that can still be revived."""
        return self._leaving.keys()

    def _gone(self, block: Block) -> None:
        """Frees the slot of a block. Watchers hear of it if it was the last of its key: one that was committed while
        another still left can go before that one has.
        """
        self._free.append(block.slot)
        if block.key not in self._blocks and block.key not in self._leaving:
            self._events.append(BlockEvent(False, block.key))

    def _evicted_slot(self) -> int:
        victim = self.victim()
        assert victim is not None, "room was counted before"
        self.evict(victim)
        return self._free.pop()

    def _use(self, blocks: Iterable[Block], now: float) -> None:
        use = self._policy.use
        for block in blocks:
            block.uses += 1
            use(block.key, now, block.parent)

    def _remove(self, block: Block) -> None:
        """Forgets a block without lease or children."""
        del self._blocks[block.key]
        self._lineage.leave(block)
        self.evicted_total += 1

    # ---- leases --------------------------------------------------------------------------------------------------

    def _lease(self, group: _Group, blocks: Iterable[Block]) -> list[Block]:
        """Those that the group did not hold before."""
        leases = group.leases
        added = []
        for block in blocks:
            if block.key not in leases:
                leases[block.key] = block
                block.leases += 1
                added.append(block)
                if block.leases == 1:
                    self.num_leased += 1
                    self._lineage.lease(block)
        return added

    def _unlease(self, group: _Group, blocks: Iterable[Block]) -> None:
        """The group holds them."""
        leases = group.leases
        for block in blocks:
            del leases[block.key]
            block.leases -= 1
            if not block.leases:
                self.num_leased -= 1
                self._lineage.unlease(block)
