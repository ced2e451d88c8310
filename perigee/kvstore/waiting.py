"""Requests that cannot be answered yet, and until when they wait."""

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from perigee.kvstore.blocks import KEY_BYTES, BlockKey
from perigee.kvstore.errors import InvalidRequest, StoreError
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.messages import Acquired, Fetched, LeasedBlock, Reservation


class Caller(NamedTuple):
    """Whom an answer is for: a request of a group."""

    group: GroupId
    request: int


Result = Acquired | Fetched | StoreError


class Answer(NamedTuple):
    """What to tell a caller. After a `Fetched` that is not `done` more will follow."""

    caller: Caller
    result: Result


@dataclass(slots=True, eq=False)
class Acquire:
    """Waits for room and then, if part of its prefix is on SSD, for that to be loaded.

    From `drop_at` on blocks that leave for it are not spilled first. Once there is room `hold` has all that it will
    get: `leased`, the slots `reserved`, and soon the blocks in `loading`.
    """

    caller: Caller
    keys: Sequence[BlockKey]
    parent: BlockKey
    deadline: float
    drop_at: float
    hold: GroupId | None = None
    leased: dict[int, LeasedBlock] = field(default_factory=dict)  # by index
    reserved: tuple[Reservation, ...] = ()
    loading: dict[BlockKey, int] = field(default_factory=dict)  # to its index


@dataclass(slots=True, eq=False)
class Fetch:
    """Waits for blocks, whoever brings them. Without `source` that is a commit on this node, or the SSD.

    From `drop_at` on blocks that leave for it are not spilled first.
    """

    caller: Caller
    keys: Sequence[BlockKey]
    parent: BlockKey
    source: str
    deadline: float
    drop_at: float
    patient: bool  # waits for what is not under way, too
    awaited: dict[BlockKey, int] = field(default_factory=dict)  # to its index
    missing: list[int] = field(default_factory=list)  # what will not come

    def parent_of(self, index: int) -> BlockKey:
        return self.keys[index - 1] if index else self.parent


class Fetches:
    """The fetches that wait, by the keys that they wait for."""

    def __init__(self) -> None:
        self._fetches: dict[Fetch, None] = {}
        self._of: dict[BlockKey, list[Fetch]] = {}

    def __contains__(self, fetch: object) -> bool:
        return fetch in self._fetches

    def all(self) -> Sequence[Fetch]:
        return tuple(self._fetches)

    def add(self, fetch: Fetch) -> None:
        self._fetches[fetch] = None
        for key in fetch.awaited:
            if waiting := self._of.get(key):
                waiting.append(fetch)
            else:
                self._of[key] = [fetch]

    def remove(self, fetch: Fetch) -> None:
        """It waits for nothing any more."""
        del self._fetches[fetch]
        for key in list(fetch.awaited):
            self.drop(fetch, key)

    def of(self, key: BlockKey) -> Sequence[Fetch]:
        """Those that wait for this block."""
        return tuple(self._of.get(key, ()))

    def arrived(self, keys: Iterable[BlockKey]) -> dict[Fetch, list[tuple[int, BlockKey]]]:
        """Those that waited for any of these blocks, and do not any more, each with the indices and keys of its own."""
        came: dict[Fetch, list[tuple[int, BlockKey]]] = {}
        for key in keys:
            for fetch in self._of.pop(key, ()):
                came.setdefault(fetch, []).append((fetch.awaited.pop(key), key))
        return came

    def drop(self, fetch: Fetch, key: BlockKey) -> int:
        """The fetch does not wait for this block any more. Returns the block's index in it."""
        waiting = self._of[key]
        waiting.remove(fetch)
        if not waiting:
            del self._of[key]
        return fetch.awaited.pop(key)


class Deadlines:
    """When the requests that still wait have waited long enough."""

    def __init__(self, waits: Callable[[Acquire | Fetch], bool]) -> None:
        self._waits = waits
        self._heap: list[tuple[float, int, Acquire | Fetch]] = []
        self._tickets = itertools.count()

    def add(self, request: Acquire | Fetch) -> None:
        heapq.heappush(self._heap, (request.deadline, next(self._tickets), request))

    def next(self) -> float | None:
        """The earliest deadline."""
        while self._heap and not self._waits(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop(self, now: float) -> Acquire | Fetch | None:
        """A request whose deadline has passed. The caller sees to it that it does not wait any more."""
        deadline = self.next()
        return heapq.heappop(self._heap)[2] if deadline is not None and deadline <= now else None


def check_keys(keys: Sequence[BlockKey]) -> None:
    """Raises InvalidRequest for what cannot be keys of one request."""
    if not set(map(len, keys)) <= {KEY_BYTES}:
        raise InvalidRequest(f"keys: one does not have {KEY_BYTES} bytes")
    if len(set(keys)) != len(keys):
        raise InvalidRequest("keys: one is there twice")


def check_parent(parent: BlockKey, keys: Sequence[BlockKey]) -> None:
    """Raises InvalidRequest if the keys cannot follow `parent`."""
    if len(parent) != KEY_BYTES:
        raise InvalidRequest(f"parent: {len(parent)} bytes; allowed are {KEY_BYTES}")
    if parent in keys:
        raise InvalidRequest("parent: it is one of the keys")


def joined(answers: list[Answer]) -> list[Answer]:
    """One answer instead of some blocks and, right after, the end."""
    if len(answers) != 2:
        return answers
    (caller, first), (_, last) = answers
    assert isinstance(first, Fetched) and isinstance(last, Fetched)
    return [Answer(caller, Fetched(first.blocks + last.blocks, last.done, last.missing))]
