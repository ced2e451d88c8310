"""Trimming: what nobody uses goes, from all tiers, and what somebody uses stays."""

import pytest

from perigee.kvstore.blocks import PREFILL, BlockKey
from perigee.kvstore.errors import InvalidRequest
from perigee.kvstore.evict import LRU
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.jobs import Load, Spill
from perigee.kvstore.limits import StoreLimits
from perigee.kvstore.messages import Acquired, BlockEvent, CommittedBlock, Tier
from perigee.kvstore.pins import PinLimits
from perigee.kvstore.records import Location
from perigee.kvstore.ssd_index import SsdIndex
from perigee.kvstore.ssd_tier import SsdTier
from perigee.kvstore.store import Store
from perigee.kvstore.waiting import Caller
from tests.kvstore.keys import ROOT, chain

FULL = 4
LIMITS = StoreLimits(PinLimits(4, 8, 100.0), reservation_s=1e9, free_low=2, free_high=4, spills=4)
PUTTING = GroupId(9, 1)


def store(num_slots: int = 8, *, ssd: bool = False) -> Store:
    tier = SsdTier(SsdIndex(4, 4), FULL) if ssd else None
    return Store(num_slots, FULL, LRU(), LIMITS, tier)


def put(store: Store, keys: list[BlockKey], *, release: bool = True) -> None:
    ((_, acquired),) = store.acquire(Caller(PUTTING, 1), keys, ROOT, 0.0, 0.0)
    assert isinstance(acquired, Acquired)
    store.commit(PUTTING, [CommittedBlock(r.slot, r.nonce, FULL, PREFILL) for r in acquired.reserved], 0.0)
    if release:
        store.release(PUTTING, 0.0)
    store.take_events()


def location(place: int) -> Location:
    return Location(place // 4, place % 4, 1)


def spill_all(store: Store) -> list[BlockKey]:
    """Writes to SSD what is to be written there: the keys of that."""
    spilled = []
    while jobs := [job for job in store.take_jobs() if isinstance(job, Spill)]:
        for job in jobs:
            spilled.append(job.record.key)
            store.spilled(job.job, location(len(spilled) - 1), 0.0)
    store.take_events()
    return spilled


def test_a_whole_chain_goes_in_whatever_order_it_is_named_and_watchers_hear_of_it() -> None:
    for order in (slice(None), slice(None, None, -1)):
        full, keys = store(), chain("a", 3)
        put(full, keys)
        assert full.trim(keys[order], 1.0) == (3, [])
        assert full.lookup(keys) == [False] * 3 and full.index.free_slots == 8
        assert full.take_events() == [BlockEvent(False, key) for key in keys[::-1]]
        assert full.totals.trimmed_blocks == 3


def test_a_block_stays_while_one_that_follows_it_does() -> None:
    full, keys = store(), chain("a", 3)
    put(full, keys)
    assert full.trim(keys[:2], 1.0) == (0, [])
    assert full.trim(keys[1:], 1.0) == (2, [])
    assert full.lookup(keys) == [True, False, False]


def test_leased_and_pinned_blocks_stay_with_those_before_them() -> None:
    full, leased, pinned = store(), chain("a", 2), chain("b", 2)
    put(full, pinned)
    full.pin("tenant", pinned[1:], 5.0, 0.0)
    put(full, leased, release=False)
    assert full.trim([*leased, *pinned], 1.0) == (0, [])
    full.release(PUTTING, 1.0)
    assert full.trim([*leased, *pinned], 6.0) == (4, [])


def test_what_is_reserved_or_unknown_is_nothing_to_trim() -> None:
    full, keys = store(), chain("a", 2)
    full.acquire(Caller(PUTTING, 1), keys, ROOT, 0.0, 0.0)
    assert full.trim([*keys, *chain("unknown", 2)], 1.0) == (0, [])
    assert full.index.num_reserved == 2


def test_who_waits_until_blocks_are_on_ssd_gets_the_room_of_trimmed_ones() -> None:
    full, keys = store(ssd=True), chain("a", 8)
    put(full, keys)
    assert full.acquire(Caller(GroupId(1, 1), 7), chain("b", 2), ROOT, 9.0, 0.0) == []
    left = [key for key in keys if full.index.block(key)]
    trimmed, ((caller, acquired),) = full.trim(left[-2:], 0.0)
    assert (trimmed, caller.request) == (2, 7) and isinstance(acquired, Acquired)


def test_copies_on_ssd_go_too() -> None:
    full, keys = store(ssd=True), chain("a", 8)
    put(full, keys)
    on_ssd = spill_all(full)
    assert on_ssd and full.lookup(keys) == [True] * 8
    assert full.trim(keys, 1.0) == (8, [])
    assert full.lookup(keys) == [False] * 8
    gone = {(event.tier, event.key) for event in full.take_events() if not event.stored}
    assert {(Tier.SSD, key) for key in on_ssd} <= gone


def test_what_is_being_read_from_ssd_stays() -> None:
    full, keys = store(ssd=True), chain("a", 8)
    put(full, keys)
    last = spill_all(full)[0]
    assert full.fetch(Caller(GroupId(1, 1), 1), [last], 9.0, 1.0) == []
    (load,) = [job for job in full.take_jobs() if isinstance(job, Load)]
    full.release(GroupId(1, 1), 1.0)  # nobody waits for it any more, but it is still on its way
    full.trim([last], 1.0)
    assert full.ssd is not None and last in full.ssd
    full.loaded(load.job, None, 1.0)


def test_what_is_being_written_to_ssd_does_not_stay_there() -> None:
    full, keys = store(ssd=True), chain("a", 8)
    put(full, keys)
    spills = [job for job in full.take_jobs() if isinstance(job, Spill)]
    full.trim([job.record.key for job in spills], 1.0)
    for place, job in enumerate(spills):
        full.spilled(job.job, location(place), 1.0)
    assert not full.ssd and full.ssd is not None
    assert full.snapshot() and all(event.tier is Tier.DRAM for event in full.snapshot())


def test_keys_of_no_block_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="keys"):
        store().trim([BlockKey(b"short")], 0.0)
