"""What holds for every eviction policy, and what is particular to each."""

from collections.abc import Callable
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.evict import LRU, S3FIFO, EvictionPolicy, HitDensity, PolicyName, make_policy
from perigee.kvstore.evict.returns import AGE_STARTS, HORIZON, NUM_AGES, ReturnTimes, hit_densities
from tests.kvstore.keys import ROOT, chain

NAMES: tuple[PolicyName, ...] = get_args(PolicyName)
BLOCKS = chain("block", 12)

every_policy = pytest.mark.parametrize("name", NAMES)
# Block number, what to do with it, and whether it is partial; a pop takes none.
steps = st.lists(
    st.tuples(st.integers(0, 11), st.sampled_from(["use", "allow", "forbid", "pop", "remove"]), st.booleans())
)


def drain(policy: EvictionPolicy) -> list[BlockKey]:
    return list(iter(policy.pop, None))


def use_and_allow(policy: EvictionPolicy, keys: list[BlockKey]) -> None:
    for now, key in enumerate(keys):
        policy.use(key, now, ROOT)
        policy.allow(key, partial=False)


def perform(policy: EvictionPolicy, todo: list[tuple[int, str, bool]]) -> tuple[list[BlockKey], set[BlockKey]]:
    """Does the steps that the index could take: the victims in order, and what is allowed in the end."""
    known: set[BlockKey] = set()
    allowed: set[BlockKey] = set()
    victims: list[BlockKey] = []
    for now, (number, step, partial) in enumerate(todo):
        key = BLOCKS[number]
        if step == "use":
            policy.forbid(key)
            allowed.discard(key)
            policy.use(key, now, BLOCKS[number - 1] if number else ROOT)
            known.add(key)
        elif step == "allow" and key in known - allowed:
            policy.allow(key, partial)
            allowed.add(key)
        elif step == "forbid":
            policy.forbid(key)
            allowed.discard(key)
        elif step == "remove" and key in allowed:
            policy.remove(key)
            allowed.remove(key)
            known.remove(key)
        elif step == "pop":
            victim = policy.pop()
            assert (victim is None) == (not allowed)
            if victim is not None:
                allowed.remove(victim)
                known.remove(victim)
                victims.append(victim)
    return victims, allowed


@every_policy
@settings(max_examples=60)
@given(todo=steps)
def test_only_what_is_allowed_goes_and_all_of_it_once(name: PolicyName, todo: list[tuple[int, str, bool]]) -> None:
    policy = make_policy(name, len(BLOCKS))
    _, allowed = perform(policy, todo)
    last = drain(policy)
    assert len(last) == len(allowed)
    assert set(last) == allowed


@every_policy
@settings(max_examples=60)
@given(todo=steps)
def test_the_same_calls_choose_the_same_victims(name: PolicyName, todo: list[tuple[int, str, bool]]) -> None:
    policies = [make_policy(name, len(BLOCKS)) for _ in range(2)]
    victims = [perform(policy, todo)[0] + drain(policy) for policy in policies]
    assert victims[0] == victims[1]


@every_policy
def test_partial_blocks_go_before_all_others(name: PolicyName) -> None:
    policy, (old, partial) = make_policy(name, 2), chain("a", 2)
    policy.use(old, 1, ROOT)
    policy.use(partial, 2, ROOT)
    policy.allow(old, partial=False)
    policy.allow(partial, partial=True)
    assert drain(policy) == [partial, old]


@every_policy
def test_forbidden_blocks_stay_until_allowed_again(name: PolicyName) -> None:
    policy, (first, second) = make_policy(name, 2), chain("a", 2)
    use_and_allow(policy, [first, second])
    policy.forbid(first)
    policy.forbid(first)
    assert policy.pop() == second
    assert policy.pop() is None
    policy.allow(first, partial=False)
    assert policy.pop() == first


# ---- LRU ---------------------------------------------------------------------------------------------------------


def test_least_recently_used_goes_first_whatever_the_order_of_permission() -> None:
    policy, keys = LRU(), chain("a", 4)
    for now, key in enumerate([*keys, keys[0]]):
        policy.use(key, now, ROOT)
    for key in reversed(keys):
        policy.allow(key, partial=False)
    assert drain(policy) == [keys[1], keys[2], keys[3], keys[0]]


@pytest.mark.parametrize("policy", [LRU(), S3FIFO()])
def test_hits_alone_do_not_make_a_queue_grow(policy: LRU | S3FIFO) -> None:
    (key,) = chain("a", 1)
    for now in range(10_000):
        policy.use(key, now, ROOT)
        policy.allow(key, partial=False)
        policy.forbid(key)
    queue = policy._allowed if isinstance(policy, LRU) else policy._small
    assert len(queue._heap) < 200
    policy.allow(key, partial=False)
    assert drain(policy) == [key]


# ---- S3-FIFO -----------------------------------------------------------------------------------------------------


def test_a_block_used_often_while_new_outlives_those_after_it() -> None:
    policy, keys = S3FIFO(), chain("a", 20)
    for now in range(3):
        policy.use(keys[0], now, ROOT)
    policy.allow(keys[0], partial=False)
    use_and_allow(policy, keys[1:])
    assert drain(policy)[-1] == keys[0]


def test_a_block_that_returns_soon_after_its_eviction_goes_to_the_main_queue() -> None:
    policy, keys = S3FIFO(), chain("a", 20)
    use_and_allow(policy, keys)
    assert policy.pop() == keys[0]
    use_and_allow(policy, [keys[0]])
    assert drain(policy)[-1] == keys[0]


# ---- hit density -------------------------------------------------------------------------------------------------

ARENA = 64
"""Blocks, so that an epoch is one commit."""


def served(policy: HitDensity, rounds: int, chains_of: Callable[[int], list[list[BlockKey]]]) -> list[list[BlockKey]]:
    """Serves the chains of each round in an arena of ARENA blocks that has only leaves; the victims of each round."""
    resident: set[BlockKey] = set()
    victims = []
    for number in range(rounds):
        gone = []
        for keys in chains_of(number):
            for key in keys:
                policy.forbid(key)
                if key not in resident and len(resident) == ARENA:
                    victim = policy.pop()
                    assert victim is not None
                    resident.remove(victim)
                    gone.append(victim)
                policy.use(key, number, ROOT)
                resident.add(key)
                policy.allow(key, partial=False)
        victims.append(gone)
    return victims


def test_without_experience_the_oldest_goes_first() -> None:
    policy, keys = HitDensity(ARENA), chain("a", 10)
    use_and_allow(policy, keys)
    assert drain(policy) == keys


def test_what_returns_is_kept_through_a_scan_longer_than_the_arena() -> None:
    """Forty blocks return once in every 120 commits: under LRU all of them would be gone by then."""
    policy, hot = HitDensity(ARENA), chain("hot", 40)
    victims = served(policy, 60, lambda number: [hot, chain(f"scan {number}", 120)])
    assert sum(victim in hot for gone in victims[50:] for victim in gone) < 0.5 * 10 * len(hot)


def test_names_of_evicted_blocks_are_kept_for_a_bounded_time() -> None:
    policy = HitDensity(ARENA)
    served(policy, 30, lambda number: [chain(f"scan {number}", ARENA)])
    assert len(policy._tracked) <= HORIZON + ARENA + 1


def test_a_return_that_is_sure_to_come_soon_is_worth_waiting_for_through_silence() -> None:
    hazards = [0.0] * (NUM_AGES - 1)
    hazards[8] = 0.9
    densities = hit_densities(hazards)
    assert densities[:9] == sorted(densities[:9])
    assert densities[9:] == [0.0] * (NUM_AGES - 9)


def test_hit_density_is_the_best_ratio_of_hits_to_time() -> None:
    hazards = [0.1, 0.0, 0.3, 0.5, 0.2, 0.0, 0.4] + [0.0] * (NUM_AGES - 8)
    for age, density in enumerate(hit_densities(hazards)[:-1]):
        hits = epochs = best = 0.0
        left = 1.0
        for hazard, (start, end) in zip(hazards[age:], list(pairwise(AGE_STARTS))[age:], strict=True):
            hits += left * hazard
            epochs += left * (end - start) * (1 - hazard / 2)
            left *= 1 - hazard
            best = max(best, hits / epochs)
        assert density == pytest.approx(best)


def test_classes_learn_apart_and_falling_hazard_is_believed_before_any_lesson() -> None:
    returns = ReturnTimes(2)
    before = returns.densities()[0][:-1]
    assert before == sorted(before, reverse=True)
    for _ in range(1000):
        returns.reached[3] += 1
        returns.returned[3] += 1
        returns.reached[NUM_AGES + 3] += 1
    often, never = returns.densities()
    assert often[3] > 10 * never[3]


def test_brackets_of_ages_grow() -> None:
    assert list(AGE_STARTS) == sorted(set(AGE_STARTS))
