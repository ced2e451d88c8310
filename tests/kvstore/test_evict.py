from perigee.kvstore.evict import LRU
from tests.kvstore.keys import chain


def _drain(policy: LRU) -> list[bytes]:
    return list(iter(policy.pop, None))


def test_least_recently_used_goes_first_whatever_the_order_of_permission() -> None:
    policy, keys = LRU(), chain("a", 4)
    for now, key in enumerate(keys):
        policy.use(key, now)
    policy.use(keys[0], 10)
    for key in reversed(keys):
        policy.allow(key, partial=False)
    assert _drain(policy) == [keys[1], keys[2], keys[3], keys[0]]


def test_partial_blocks_go_before_all_others() -> None:
    policy, (old, partial) = LRU(), chain("a", 2)
    policy.use(old, 1)
    policy.use(partial, 2)
    policy.allow(old, partial=False)
    policy.allow(partial, partial=True)
    assert _drain(policy) == [partial, old]


def test_forbidden_blocks_stay_until_allowed_again() -> None:
    policy, (first, second) = LRU(), chain("a", 2)
    for key in (first, second):
        policy.use(key, 1)
        policy.allow(key, partial=False)
    policy.forbid(first)
    policy.forbid(first)
    assert policy.pop() == second
    assert policy.pop() is None
    policy.allow(first, partial=False)
    assert policy.pop() == first


def test_hits_alone_do_not_make_it_grow() -> None:
    policy, (key,) = LRU(), chain("a", 1)
    for now in range(10_000):
        policy.use(key, now)
        policy.allow(key, partial=False)
        policy.forbid(key)
    assert len(policy._heap) < 200
    policy.allow(key, partial=False)
    assert _drain(policy) == [key]
