"""One node's tiers behind acquire, fetch, commit, release and lookup.

A synchronous core: requests and the current time go in, answers come out, and whoever calls does the I/O. Requests that
cannot be answered yet wait here: acquires for room, first come first served; fetches for the commit of their keys.

Today there is one tier, the DRAM arena. A tier below it comes in at two places: `BlockIndex._evict`, where a block
leaves the arena, and `fetch`, where a key is not in it. Pulling from another node is a third answer to the latter.
"""

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from perigee.kvstore.blocks import KEY_BYTES, BlockKey
from perigee.kvstore.dram import Arena
from perigee.kvstore.errors import InvalidRequest, NoRoom, StoreError, TooLarge
from perigee.kvstore.evict import EvictionPolicy
from perigee.kvstore.index import BlockIndex, GroupId
from perigee.kvstore.messages import Acquired, CommittedBlock, Fetched


class Caller(NamedTuple):
    """Whom an answer is for: a request of a group."""

    group: GroupId
    request: int


class Answer(NamedTuple):
    """What to tell a caller. After a `Fetched` that is not `done` more will follow."""

    caller: Caller
    result: Acquired | Fetched | StoreError


@dataclass(slots=True, eq=False)
class _Acquire:
    caller: Caller
    keys: Sequence[BlockKey]
    parent: BlockKey


@dataclass(slots=True, eq=False)
class _Fetch:
    caller: Caller
    awaited: dict[BlockKey, int] = field(default_factory=dict)  # to its index


class Store:
    """The blocks of `arena`, each of at most `block_tokens` tokens. `now` is any clock in seconds that never goes back.

    Methods raise InvalidRequest, with nothing changed, for a request that is wrong in itself.
    """

    def __init__(self, arena: Arena, block_tokens: int, policy: EvictionPolicy) -> None:
        self.arena = arena
        self.block_tokens = block_tokens
        self.index = BlockIndex(arena.num_slots, block_tokens, policy)
        self.hit_blocks_total = 0  # of acquires, which is to say of prompts: leased ...
        self.miss_blocks_total = 0  # ... and reserved
        self._acquires: dict[_Acquire, None] = {}  # in order of arrival
        self._fetches: dict[_Fetch, None] = {}
        self._fetches_of: dict[BlockKey, list[_Fetch]] = {}
        self._deadlines: list[tuple[float, int, _Acquire | _Fetch]] = []
        self._tickets = itertools.count()

    # ---- requests ------------------------------------------------------------------------------------------------

    def acquire(
        self, caller: Caller, keys: Sequence[BlockKey], parent: BlockKey, wait_s: float, now: float
    ) -> list[Answer]:
        """Leases the longest committed prefix of `keys` and reserves a slot for each key after; or waits for room."""
        _check_keys(keys)
        _check_parent(parent, keys)
        if len(keys) > self.index.num_slots:
            message = f"{len(keys)} blocks; the arena has {self.index.num_slots} slots of {self.arena.slot_bytes} bytes"
            return [Answer(caller, TooLarge(message))]
        request = _Acquire(caller, keys, parent)
        acquired = self._try_acquire(request, now)
        if acquired:
            return [Answer(caller, acquired)]
        if wait_s <= 0:
            return [Answer(caller, self._no_room(request))]
        self._acquires[request] = None
        self._set_deadline(request, now + wait_s)
        return []

    def fetch(self, caller: Caller, keys: Sequence[BlockKey], wait_s: float, now: float) -> list[Answer]:
        """Leases what is committed of `keys` now, and the others as they are."""
        _check_keys(keys)
        found = tuple(self.index.lease(caller.group, enumerate(keys), now))
        indices = {block.index for block in found}
        awaited = {key: index for index, key in enumerate(keys) if index not in indices}
        if not awaited or wait_s <= 0:
            return [Answer(caller, Fetched(found, done=True, missing=tuple(awaited.values())))]
        self._await(_Fetch(caller, awaited), now + wait_s)
        return [Answer(caller, Fetched(found))] if found else []

    def commit(self, group: GroupId, blocks: Sequence[CommittedBlock], now: float) -> list[Answer]:
        """Makes written slots readable. The answers are for others: those who waited for these blocks, or for room."""
        stored = self.index.commit(group, blocks, now)
        return self._arrived(stored, now) + self._serve(now)

    def release(self, group: GroupId, now: float) -> list[Answer]:
        """Ends all that the group has and waits for."""
        answers = [self._give_up(request) for request in self._waiting() if request.caller.group == group]
        self.index.release(group)
        return answers + self._serve(now)

    def disconnect(self, connection: int, now: float) -> list[Answer]:
        """Ends all that the connection has and waits for. None of the answers is for it."""
        for request in self._waiting():
            if request.caller.group.connection == connection:
                self._give_up(request)
        for group in self.index.groups_of(connection):
            self.index.release(group)
        return self._serve(now)

    def lookup(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Which of `keys` are committed here. Extends nothing."""
        return self.index.lookup(keys)

    # ---- time ----------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `expire` must be called next."""
        while self._deadlines and not self._is_waiting(self._deadlines[0][2]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def expire(self, now: float) -> list[Answer]:
        """Gives up the requests whose time is over."""
        answers: list[Answer] = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            answers.append(self._give_up(heapq.heappop(self._deadlines)[2]))
        return answers + self._serve(now) if answers else []

    def _set_deadline(self, request: _Acquire | _Fetch, deadline: float) -> None:
        heapq.heappush(self._deadlines, (deadline, next(self._tickets), request))

    def _is_waiting(self, request: _Acquire | _Fetch) -> bool:
        return request in self._acquires or request in self._fetches

    def _give_up(self, request: _Acquire | _Fetch) -> Answer:
        if isinstance(request, _Acquire):
            del self._acquires[request]
            return Answer(request.caller, self._no_room(request))
        missing = tuple(request.awaited.values())
        self._forget(request)
        return Answer(request.caller, Fetched((), done=True, missing=missing))

    def _waiting(self) -> list[_Acquire | _Fetch]:
        return [*self._acquires, *self._fetches]

    # ---- waiting for room ----------------------------------------------------------------------------------------

    def _try_acquire(self, request: _Acquire, now: float) -> Acquired | None:
        """None if there is no room, or others wait for it. What needs no slot never waits behind what does."""
        others_wait = self._acquires and next(iter(self._acquires)) is not request
        if others_wait and not all(self.index.lookup(request.keys)):
            return None
        acquired = self.index.acquire(request.caller.group, request.keys, request.parent, now)
        if acquired:
            self.hit_blocks_total += len(acquired.leased)
            self.miss_blocks_total += len(acquired.reserved)
        return acquired

    def _serve(self, now: float) -> list[Answer]:
        """Answers waiting acquires, the oldest first, while there is room. Each gets the prefix that is here now."""
        answers = []
        while self._acquires:
            request = next(iter(self._acquires))
            acquired = self._try_acquire(request, now)
            if acquired is None:
                break
            del self._acquires[request]
            answers.append(Answer(request.caller, acquired))
        return answers

    def _no_room(self, request: _Acquire) -> NoRoom:
        return NoRoom(
            f"{len(request.keys)} blocks; {self.index.room} of {self.index.num_slots} slots are free or evictable, "
            f"{len(self._acquires)} requests are waiting"
        )

    # ---- waiting for blocks --------------------------------------------------------------------------------------

    def _await(self, request: _Fetch, deadline: float) -> None:
        self._fetches[request] = None
        for key in request.awaited:
            self._fetches_of.setdefault(key, []).append(request)
        self._set_deadline(request, deadline)

    def _forget(self, request: _Fetch) -> None:
        del self._fetches[request]
        for key in request.awaited:
            waiting = self._fetches_of[key]
            waiting.remove(request)
            if not waiting:
                del self._fetches_of[key]

    def _arrived(self, keys: Iterable[BlockKey], now: float) -> list[Answer]:
        """Leases blocks that were just committed for those who wait for them, one answer per fetch."""
        came: dict[_Fetch, list[tuple[int, BlockKey]]] = {}
        for key in keys:
            for request in self._fetches_of.pop(key, ()):
                came.setdefault(request, []).append((request.awaited.pop(key), key))
        return [self._hand_over(request, wanted, now) for request, wanted in came.items()]

    def _hand_over(self, request: _Fetch, wanted: list[tuple[int, BlockKey]], now: float) -> Answer:
        blocks = tuple(self.index.lease(request.caller.group, wanted, now))
        done = not request.awaited
        if done:
            self._forget(request)
        return Answer(request.caller, Fetched(blocks, done))


def _check_keys(keys: Sequence[BlockKey]) -> None:
    if any(len(key) != KEY_BYTES for key in keys):
        raise InvalidRequest(f"keys: one does not have {KEY_BYTES} bytes")
    if len(set(keys)) != len(keys):
        raise InvalidRequest("keys: one is there twice")


def _check_parent(parent: BlockKey, keys: Sequence[BlockKey]) -> None:
    if len(parent) != KEY_BYTES:
        raise InvalidRequest(f"parent: {len(parent)} bytes; allowed are {KEY_BYTES}")
    if parent in keys:
        raise InvalidRequest("parent: it is one of the keys")
