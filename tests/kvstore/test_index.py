from dataclasses import replace

import pytest

from perigee.kvstore.blocks import PREFILL, BlockKey
from perigee.kvstore.errors import InvalidRequest
from perigee.kvstore.evict import LRU
from perigee.kvstore.holdings import NODE, GroupId
from perigee.kvstore.index import BlockIndex
from perigee.kvstore.messages import BlockEvent, CommittedBlock, Reservation
from tests.kvstore.keys import ROOT, chain

A, B = GroupId(1, 1), GroupId(2, 1)
FULL = 32


@pytest.fixture
def index() -> BlockIndex:
    return BlockIndex(4, FULL, LRU())


def _commits(reserved: tuple[Reservation, ...], num_tokens: int = FULL) -> list[CommittedBlock]:
    return [CommittedBlock(r.slot, r.nonce, num_tokens, PREFILL) for r in reserved]


def _put(
    index: BlockIndex, keys: list[BlockKey], parent: BlockKey = ROOT, now: float = 0.0, num_tokens: int = FULL
) -> None:
    acquired = index.acquire(A, keys, parent, now)
    assert acquired
    index.commit(A, _commits(acquired.reserved, num_tokens), now)
    index.release(A)


def test_acquire_leases_the_committed_prefix_and_reserves_the_rest(index: BlockIndex) -> None:
    keys = chain("a", 3)
    _put(index, keys[:2])
    acquired = index.acquire(B, keys, ROOT, 1.0)
    assert acquired
    assert [block.index for block in acquired.leased] == [0, 1]
    assert [block.index for block in acquired.reserved] == [2]
    assert (index.num_leased, index.num_reserved) == (2, 1)


def test_a_reserved_block_is_not_readable_before_its_commit(index: BlockIndex) -> None:
    (key,) = chain("a", 1)
    acquired = index.acquire(A, [key], ROOT, 0.0)
    assert acquired
    assert index.lookup([key]) == [False]
    assert index.lease(B, [(0, key)], 0.0) == []
    assert index.commit(A, _commits(acquired.reserved), 0.0) == [key]
    assert index.lookup([key]) == [True]


def test_a_refused_acquire_changes_nothing(index: BlockIndex) -> None:
    held, wanted = chain("a", 3), chain("b", 2)
    _put(index, wanted[:1])
    assert index.acquire(A, held, ROOT, 1.0)
    before = (index.num_leased, index.num_reserved, index.room, index.take_events())
    assert index.acquire(B, wanted, ROOT, 2.0) is None
    assert (index.num_leased, index.num_reserved, index.room) == before[:3]
    assert index.take_events() == []


def test_children_go_before_parents_and_partial_blocks_first(index: BlockIndex) -> None:
    old, tail = chain("old", 3), chain("tail", 1)
    _put(index, old, now=1.0)
    _put(index, tail, now=2.0, num_tokens=5)
    index.take_events()
    assert index.acquire(B, chain("new", 4), ROOT, 3.0)
    assert index.take_events() == [BlockEvent(False, key) for key in (*tail, *reversed(old))]


def test_a_leased_child_keeps_its_ancestors(index: BlockIndex) -> None:
    keys = chain("a", 3)
    _put(index, keys)
    index.lease(B, [(0, keys[2])], 1.0)
    assert index.room == 1
    assert index.acquire(A, chain("b", 2), ROOT, 2.0) is None
    index.release(B)
    assert index.acquire(A, chain("b", 4), ROOT, 3.0)


def test_a_parent_that_comes_after_its_child_is_kept_for_it(index: BlockIndex) -> None:
    parent, child = chain("a", 2)
    _put(index, [child], parent=parent, now=1.0)
    _put(index, [parent], now=2.0)
    index.take_events()
    assert index.acquire(B, chain("b", 4), ROOT, 3.0)
    assert [event.key for event in index.take_events()] == [child, parent]


def test_the_first_commit_of_a_key_wins_and_the_second_gets_a_lease_on_it(index: BlockIndex) -> None:
    (key,) = chain("a", 1)
    first, second = index.acquire(A, [key], ROOT, 0.0), index.acquire(B, [key], ROOT, 0.0)
    assert first and second
    assert first.reserved[0].slot != second.reserved[0].slot
    assert index.commit(B, _commits(second.reserved), 0.0) == [key]
    assert index.commit(A, _commits(first.reserved), 0.0) == []
    assert (len(index), index.free_slots, index.num_reserved) == (1, 3, 0)
    index.release(B)
    assert index.num_leased == 1
    (leased,) = index.lease(A, [(0, key)], 0.0)
    assert leased.slot == second.reserved[0].slot


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"slot": 99}, "slot 99, nonce 2: not a reservation of this group"),
        ({"nonce": 77}, "slot 1, nonce 77: not a reservation of this group"),
        ({"num_tokens": 0}, "num_tokens: 0; allowed are 1 to 32"),
        ({"num_tokens": 33}, "num_tokens: 33; allowed are 1 to 32"),
        ({"origin": 7}, "origin: 7; allowed are 0"),
    ],
)
def test_a_wrong_commit_is_refused_and_nothing_of_it_happens(
    index: BlockIndex, change: dict[str, int], complaint: str
) -> None:
    acquired = index.acquire(A, chain("a", 2), ROOT, 0.0)
    assert acquired
    good, real = _commits(acquired.reserved)
    with pytest.raises(InvalidRequest, match=complaint):
        index.commit(A, [good, replace(real, **change)], 0.0)
    assert (len(index), index.num_reserved) == (0, 2)
    assert len(index.commit(A, [good, real], 0.0)) == 2


def test_a_slot_is_not_committed_twice(index: BlockIndex) -> None:
    acquired = index.acquire(A, chain("a", 1), ROOT, 0.0)
    assert acquired
    with pytest.raises(InvalidRequest, match="twice"):
        index.commit(A, _commits(acquired.reserved) * 2, 0.0)
    with pytest.raises(InvalidRequest, match="not a reservation"):
        index.commit(B, _commits(acquired.reserved), 0.0)


def test_a_block_that_goes_while_another_of_its_key_still_leaves_is_there_until_both_are_gone(
    index: BlockIndex,
) -> None:
    (key,) = chain("a", 1)
    first, second = index.acquire(A, [key], ROOT, 0.0), index.acquire(B, [key], ROOT, 0.0)
    assert first and second
    index.commit(A, _commits(first.reserved), 0.0)
    index.release(A)
    leaving, writer = index.victim(), GroupId(NODE, 1)
    assert leaving
    index.leave(writer, leaving)
    index.commit(B, _commits(second.reserved), 1.0)
    index.release(B)
    assert index.take_events() == [BlockEvent(True, key)]
    again = index.victim()
    assert again
    index.evict(again)
    assert index.take_events() == []
    index.left(writer, leaving)
    assert index.take_events() == [BlockEvent(False, key)]
    assert (len(index), index.free_slots) == (0, 4)


def test_leases_of_a_connection_that_is_gone_count_as_orphaned(index: BlockIndex) -> None:
    _put(index, chain("a", 1))
    index.acquire(B, chain("a", 3), ROOT, 0.0)
    assert index.orphaned({A.connection}) == 3
    assert index.orphaned({B.connection}) == 0
    for group in index.groups_of(B.connection):
        index.release(group)
    assert index.orphaned(set()) == 0
    assert index.room == 4
