"""Requests that wait: for room, and for blocks. No socket, no clock."""

import pytest

from perigee.kvstore.blocks import PREFILL, BlockKey
from perigee.kvstore.errors import InvalidRequest, NoRoom, TooLarge
from perigee.kvstore.evict import LRU
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.messages import Acquired, CommittedBlock, Fetched
from perigee.kvstore.store import Store
from perigee.kvstore.waiting import Answer, Caller
from tests.kvstore.keys import ROOT, chain

A, B, C, D = (Caller(GroupId(connection, 1), 10 * connection) for connection in (1, 2, 3, 4))


@pytest.fixture
def store() -> Store:
    """Four slots, nothing in them."""
    return Store(4, 32, LRU())


def _acquire(store: Store, caller: Caller, keys: list[BlockKey], wait_s: float = 0.0, now: float = 0.0) -> list[Answer]:
    return store.acquire(caller, keys, ROOT, wait_s, now)


def _commit(store: Store, caller: Caller, answers: list[Answer], count: int = 99) -> list[Answer]:
    """Commits the first `count` of what `answers`, one of them, reserved."""
    (acquired,) = [answer.result for answer in answers if answer.caller == caller]
    assert isinstance(acquired, Acquired)
    blocks = [CommittedBlock(r.slot, r.nonce, 32, PREFILL) for r in acquired.reserved[:count]]
    return store.commit(caller.group, blocks, 0.0)


def _callers(answers: list[Answer]) -> list[Caller]:
    return [answer.caller for answer in answers]


def test_more_blocks_than_slots_is_too_large_however_long_one_waits(store: Store) -> None:
    ((_, refused),) = _acquire(store, A, chain("a", 5), wait_s=100.0)
    assert isinstance(refused, TooLarge)
    assert str(refused) == "5 blocks; the arena has 4 slots"


def test_without_waiting_no_room_is_said_at_once(store: Store) -> None:
    _acquire(store, A, chain("a", 3))
    ((caller, refused),) = _acquire(store, B, chain("b", 2))
    assert caller == B
    assert isinstance(refused, NoRoom)
    assert "2 blocks; 1 of 4 slots" in str(refused)


def test_a_release_serves_those_who_wait_in_order_of_arrival(store: Store) -> None:
    _acquire(store, A, chain("a", 4))
    assert _acquire(store, B, chain("b", 3), wait_s=9.0) == []
    assert _acquire(store, C, chain("c", 1), wait_s=9.0) == []
    assert _acquire(store, D, chain("d", 1), wait_s=9.0) == []
    assert _callers(store.release(A.group, 1.0)) == [B, C]
    assert _callers(store.release(C.group, 2.0)) == [D]


def test_nobody_overtakes_a_larger_request_that_waits(store: Store) -> None:
    _acquire(store, A, chain("a", 2))
    assert _acquire(store, B, chain("b", 4), wait_s=9.0) == []
    assert _acquire(store, C, chain("c", 1), wait_s=9.0) == []
    ((caller, refused),) = _acquire(store, D, chain("d", 1))
    assert (caller, type(refused)) == (D, NoRoom)
    assert _callers(store.release(A.group, 1.0)) == [B]


def test_a_request_that_needs_no_slot_is_answered_past_the_queue(store: Store) -> None:
    keys = chain("a", 2)
    _commit(store, A, _acquire(store, A, keys))
    assert _acquire(store, B, chain("b", 4), wait_s=9.0) == []
    ((caller, acquired),) = _acquire(store, C, keys)
    assert caller == C
    assert isinstance(acquired, Acquired) and len(acquired.leased) == 2


def test_a_waiting_acquire_gets_the_prefix_that_is_there_when_its_turn_comes(store: Store) -> None:
    keys = chain("a", 3)
    answers = _acquire(store, A, keys)
    assert _acquire(store, B, keys, wait_s=9.0) == []
    assert _commit(store, A, answers, count=1) == []  # two blocks and one free slot: still no room
    ((caller, acquired),) = _commit(store, A, [Answer(A, _rest(answers, 1))], count=1)
    assert caller == B
    assert isinstance(acquired, Acquired)
    assert ([b.index for b in acquired.leased], [r.index for r in acquired.reserved]) == ([0, 1], [2])


def _rest(answers: list[Answer], done: int) -> Acquired:
    (acquired,) = [answer.result for answer in answers]
    assert isinstance(acquired, Acquired)
    return Acquired((), acquired.reserved[done:])


def test_at_its_deadline_an_acquire_is_refused_and_the_next_in_line_served(store: Store) -> None:
    _acquire(store, A, chain("a", 2))
    assert _acquire(store, B, chain("b", 3), wait_s=5.0) == []
    assert _acquire(store, C, chain("c", 2), wait_s=9.0) == []
    assert store.next_deadline() == 5.0
    assert store.expire(4.9) == []
    refused, served = store.expire(5.0)
    assert (refused.caller, type(refused.result)) == (B, NoRoom)
    assert (served.caller, type(served.result)) == (C, Acquired)
    assert store.next_deadline() is None


def test_a_fetch_gets_blocks_as_they_are_committed(store: Store) -> None:
    keys = chain("a", 3)
    answers = _acquire(store, A, keys)
    _commit(store, A, answers, count=1)
    ((_, first),) = store.fetch(B, keys, 9.0, 0.0)
    assert isinstance(first, Fetched) and not first.done
    assert [block.index for block in first.blocks] == [0]
    ((_, rest),) = _commit(store, A, [Answer(A, _rest(answers, 1))])
    assert isinstance(rest, Fetched) and rest.done and rest.missing == ()
    assert [block.index for block in rest.blocks] == [1, 2]
    store.release(A.group, 1.0)
    assert store.index.num_leased == 3  # B's own leases
    assert store.next_deadline() is None


def test_at_its_deadline_a_fetch_says_what_is_missing(store: Store) -> None:
    keys = chain("a", 3)
    _commit(store, A, _acquire(store, A, keys), count=1)
    store.fetch(B, keys, 3.0, 0.0)
    assert store.expire(3.0) == [Answer(B, Fetched((), done=True, missing=(1, 2)))]
    assert store.index.num_leased == 1


def test_a_fetch_that_may_not_wait_is_answered_once(store: Store) -> None:
    assert store.fetch(A, chain("a", 2), 0.0, 0.0) == [Answer(A, Fetched((), done=True, missing=(0, 1)))]


def test_releasing_a_group_ends_what_it_waits_for(store: Store) -> None:
    keys = chain("a", 4)
    answers = _acquire(store, A, keys)
    store.fetch(B, keys, 9.0, 0.0)
    _acquire(store, Caller(B.group, 21), chain("b", 1), wait_s=9.0)
    refused, ended = store.release(B.group, 1.0)
    assert (refused.caller.request, type(refused.result)) == (21, NoRoom)
    assert ended == Answer(B, Fetched((), done=True, missing=(0, 1, 2, 3)))
    assert _commit(store, A, answers) == []
    assert store.next_deadline() is None


def test_a_connection_that_ends_leaves_nothing(store: Store) -> None:
    keys = chain("a", 2)
    answers = _acquire(store, A, keys)
    store.fetch(A, chain("x", 2), 9.0, 0.0)
    assert _acquire(store, B, chain("b", 4), wait_s=9.0) == []
    _commit(store, A, answers, count=1)
    assert _callers(store.disconnect(A.group.connection, 1.0)) == [B]
    assert store.index.orphaned({B.group.connection}) == 0
    assert (store.index.num_reserved, store.index.num_leased) == (4, 0)


@pytest.mark.parametrize(
    ("keys", "parent", "complaint"),
    [
        ([BlockKey(b"short")], ROOT, "keys: one does not have 32 bytes"),
        (chain("a", 1) * 2, ROOT, "keys: one is there twice"),
        (chain("a", 1), BlockKey(b""), "parent: 0 bytes; allowed are 32"),
        (chain("a", 2), chain("a", 2)[1], "parent: it is one of the keys"),
    ],
)
def test_keys_that_cannot_be_a_chain_are_refused(
    store: Store, keys: list[BlockKey], parent: BlockKey, complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        store.acquire(A, keys, parent, 0.0, 0.0)
    assert store.index.num_reserved == 0


def test_hits_and_misses_are_those_of_acquires(store: Store) -> None:
    keys = chain("a", 3)
    _commit(store, A, _acquire(store, A, keys[:2]))
    _acquire(store, B, keys)
    store.fetch(C, keys, 0.0, 0.0)
    assert (store.totals.hit_blocks, store.totals.miss_blocks) == (2, 3)
