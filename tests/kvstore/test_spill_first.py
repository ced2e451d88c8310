"""A request that needs more slots than are free: what leaves for it goes to SSD first, as long as it may wait."""

from perigee.kvstore.blocks import PREFILL, BlockKey
from perigee.kvstore.evict import LRU
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.jobs import Spill
from perigee.kvstore.limits import StoreLimits
from perigee.kvstore.messages import Acquired, CommittedBlock, Fetched
from perigee.kvstore.pins import PinLimits
from perigee.kvstore.ssd_index import SsdIndex
from perigee.kvstore.ssd_tier import SsdTier
from perigee.kvstore.store import Store
from perigee.kvstore.waiting import Answer, Caller
from tests.kvstore.fake_disk import FakeDisk
from tests.kvstore.keys import ROOT, chain

NUM_SLOTS = 4
OLD = chain("old", NUM_SLOTS)
A, B = (Caller(GroupId(connection, 1), connection) for connection in (1, 2))


def _full_store(now: float = 0.0) -> Store:
    """All slots hold blocks of `OLD`; none is made free ahead of need. Requests wait a second for spills."""
    limits = StoreLimits(PinLimits(0, 0, 1.0), 1e9, free_low=0, free_high=0, spills=1, spill_wait_s=1.0)
    store = Store(NUM_SLOTS, 32, LRU(), limits, SsdTier(SsdIndex(8, 4), 32))
    ((_, acquired),) = store.acquire(A, OLD, ROOT, 0.0, now)
    assert isinstance(acquired, Acquired)
    store.commit(A.group, [CommittedBlock(r.slot, r.nonce, 32, PREFILL) for r in acquired.reserved], now)
    store.release(A.group, now)
    return store


def _end_spills(store: Store, disk: FakeDisk, now: float) -> list[Answer]:
    answers = []
    for job in store.take_jobs():
        assert isinstance(job, Spill)
        answers += store.spilled(job.job, disk.append(job.record, job.record.key), now)
    return answers


def _acquire(store: Store, keys: list[BlockKey], wait_s: float) -> list[Answer]:
    return store.acquire(B, keys, ROOT, wait_s, 1.0)


def test_who_may_wait_gets_slots_once_their_blocks_are_on_ssd() -> None:
    store = _full_store()
    assert _acquire(store, chain("new", 3), wait_s=60.0) == []
    ((caller, acquired),) = _end_spills(store, FakeDisk(8, 4), 1.1)
    assert caller == B and isinstance(acquired, Acquired) and len(acquired.reserved) == 3
    assert store.lookup(OLD) == [True] * NUM_SLOTS


def test_who_may_not_wait_gets_slots_at_once_and_their_blocks_are_dropped() -> None:
    store = _full_store()
    ((_, acquired),) = _acquire(store, chain("new", 3), wait_s=0.0)
    assert isinstance(acquired, Acquired) and len(acquired.reserved) == 3
    assert store.lookup(OLD) == [True, False, False, False]


def test_its_own_prefix_is_not_what_leaves_for_a_request() -> None:
    store = _full_store()
    assert _acquire(store, [*OLD[:2], *chain("new", 2)], wait_s=60.0) == []
    ((_, acquired),) = _end_spills(store, FakeDisk(8, 4), 1.1)
    assert isinstance(acquired, Acquired) and (len(acquired.leased), len(acquired.reserved)) == (2, 2)


def test_a_disk_that_is_too_slow_is_not_waited_for() -> None:
    store = _full_store()
    assert _acquire(store, chain("new", 2), wait_s=60.0) == []
    assert store.next_deadline() == 2.0
    ((_, acquired),) = store.expire(2.0)  # of the four, two are being written, and two are dropped
    assert isinstance(acquired, Acquired) and len(acquired.reserved) == 2
    assert store.lookup(OLD) == [False, False, True, True]


def test_a_pull_waits_for_spills_too() -> None:
    store = _full_store()
    assert store.fetch(B, chain("far", 2), 60.0, 1.0, "far", ROOT) == []
    assert store.index.num_reserved == 0
    disk = FakeDisk(8, 4)
    spills = store.take_jobs()
    assert len(spills) == 2
    for job in spills:
        assert isinstance(job, Spill)
        store.spilled(job.job, disk.append(job.record, job.record.key), 1.1)
    assert store.index.num_reserved == 2
    assert all(not isinstance(answer.result, Fetched) for answer in store.expire(1.2))
    assert store.lookup(OLD) == [True] * NUM_SLOTS


def test_a_disk_that_fails_meanwhile_is_not_waited_for() -> None:
    store = _full_store()
    assert _acquire(store, chain("new", 2), wait_s=60.0) == []
    spills = store.take_jobs()
    answers = store.ssd_failed(1.2)
    for job in spills:
        assert isinstance(job, Spill)
        answers += store.spilled(job.job, None, 1.2)
    ((_, acquired),) = answers
    assert isinstance(acquired, Acquired) and len(acquired.reserved) == 2
