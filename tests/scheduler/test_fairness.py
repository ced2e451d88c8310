"""Who goes first, and who has had enough."""

import heapq
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.scheduler.commands import Dispatch
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.fairness import PRIORITY_BOOST_S, Ranks, Shares, parse_weights
from perigee.scheduler.ids import ServerId
from perigee.workers.engine.sequence import Ref
from tests.scheduler.cluster import PROFILE, Cluster, keys, only


def ask(tenant: str, priority: int = 0, age_s: float = 0.0) -> RequestArrived:
    return RequestArrived(ServerId("s"), Ref("r"), (), 1, 1, age_s=age_s, tenant=tenant, priority=priority)


def served(ranks: Ranks, waiting: list[tuple[str, float]], seconds: float) -> dict[str, float]:
    """The work that each tenant gets from one worker, on which all of `waiting` wait: tenant and work."""
    queue = [
        (ranks.rank(ask(tenant), work_s, 1), order, tenant, work_s) for order, (tenant, work_s) in enumerate(waiting)
    ]
    heapq.heapify(queue)
    got: dict[str, float] = defaultdict(float)
    while seconds > 0 and queue:
        rank, _, tenant, work_s = heapq.heappop(queue)
        seconds -= work_s
        got[tenant] += work_s
        ranks.served(rank, 0)
    return got


WORK = st.floats(0.1, 5.0)


@settings(max_examples=50)
@given(st.lists(WORK, min_size=60, max_size=60), st.lists(WORK, min_size=60, max_size=60), st.integers(1, 4))
def test_of_two_that_wait_all_the_time_none_gets_less_than_its_share_by_more_than_a_request(
    first: list[float], second: list[float], weight: int
) -> None:
    ranks = Ranks({"a": float(weight)})
    waiting = [("a", work_s) for work_s in first for _ in range(weight)] + [("b", work_s) for work_s in second]
    seconds = min(sum(first), sum(second)) * 0.8
    got = served(ranks, waiting, seconds)
    longest = max(*first, *second)
    assert abs(got["a"] / weight - got["b"]) <= longest / weight + longest


@settings(max_examples=50)
@given(st.lists(WORK, min_size=1, max_size=30))
def test_a_tenant_that_comes_anew_waits_for_one_request_of_the_busy_one_at_most(works: list[float]) -> None:
    ranks = Ranks()
    ranks.idle(100.0)
    busy = [ranks.rank(ask("busy"), work_s, 1) for work_s in works]
    ranks.served(busy[0], 0)
    new = ranks.rank(ask("new"), 1.0, 1)
    assert sum(rank < new for rank in busy[1:]) == 0


def test_alone_and_idle_a_rank_is_the_time_of_arrival() -> None:
    ranks = Ranks()
    ranks.idle(100.0)
    assert ranks.rank(ask("a", age_s=1.5), 3.0, 1) == pytest.approx(98.5)


def test_one_tenants_requests_go_in_the_order_in_which_they_came() -> None:
    ranks = Ranks()
    order = [ranks.rank(ask("a"), 1.0, 2) for _ in range(10)]
    assert order == sorted(set(order))


def test_to_have_been_idle_earns_nothing() -> None:
    ranks = Ranks()
    ranks.rank(ask("b"), 1.0, 1)
    ranks.idle(1000.0)
    first = [ranks.rank(ask(tenant), 1.0, 1) for tenant in ("a", "b")]
    assert first == [1000.0, 1000.0]


def test_to_have_used_what_nobody_wanted_costs_nothing() -> None:
    ranks = Ranks()
    for _ in range(100):
        ranks.served(ranks.rank(ask("busy"), 10.0, 1), 0)
    late = ranks.rank(ask("late"), 1.0, 1)
    assert ranks.rank(ask("busy"), 1.0, 1) - late <= 10.0


def test_higher_priority_goes_first_and_nothing_waits_for_ever() -> None:
    ranks = Ranks()
    low = ranks.rank(ask("a", priority=-1), 1.0, 1)
    passed = 0
    while (high := ranks.rank(ask("b", priority=1), 1.0, 1)) < low:
        ranks.served(high, 1)
        passed += 1
    assert 0 < passed <= 2 * PRIORITY_BOOST_S + 1


def test_the_memory_of_tenants_is_bounded() -> None:
    ranks = Ranks()
    for index in range(10_000):
        ranks.rank(ask(f"t{index}"), 1.0, 1)
    assert len(ranks._ends) <= 4096


# ---- what is held


def test_nobody_is_above_its_share_while_nobody_else_is_refused() -> None:
    shares = Shares()
    shares.take("a", 100)
    assert not shares.is_above("a", 0.0)


def test_who_holds_more_than_a_fair_share_is_above_it_once_another_was_refused() -> None:
    shares = Shares()
    shares.take("a", 60)
    shares.take("b", 40)
    shares.refused("b", 0.0)
    assert (shares.is_above("a", 1.0), shares.is_above("b", 1.0)) == (True, False)
    shares.give_back("a", 30)
    assert (shares.is_above("a", 1.0), shares.is_above("b", 1.0)) == (False, False)


def test_weights_say_what_is_fair() -> None:
    shares = Shares({"a": 3.0})
    shares.take("a", 70)
    shares.take("b", 30)
    shares.refused("b", 0.0)
    assert not shares.is_above("a", 1.0)


def test_weights_are_read_as_they_are_said() -> None:
    assert parse_weights(["gold=4", " free = 0.5 ", "a=b=1e-3"]) == {"gold": 4.0, "free": 0.5, "a=b": 0.001}
    assert parse_weights([]) == {}


@pytest.mark.parametrize("part", ["gold", "gold=", "=4", "gold=0", "gold=-1", "gold=inf", "gold=nan", "gold=much", ""])
def test_what_is_no_weight_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match=f"{part!r}: allowed is NAME=WEIGHT, .* a finite number above 0"):
        parse_weights([part])


def test_a_tenant_has_one_weight() -> None:
    with pytest.raises(ValueError, match="'gold=5': 'gold' has a weight already"):
        parse_weights(["gold=4", "gold=5"])


def test_a_conductor_lets_a_tenant_of_more_weight_go_first() -> None:
    cluster = Cluster()
    cluster.conductor = Conductor(profile=PROFILE, tenant_weights={"heavy": 10.0})
    cluster.add_store()
    cluster.add_worker("p0", "prefill")
    cluster.add_worker("d0", "decode")
    ranks = {"heavy": 0.0, "other": 0.0}
    for index in range(3):
        for tenant in ranks:
            request = RequestArrived(ServerId("s"), Ref(f"{tenant}-{index}"), keys(64), 64, 8, tenant=tenant)
            ranks[tenant] = only(cluster.hear(request), Dispatch).rank - cluster.now
    assert 0 < ranks["heavy"] == pytest.approx(ranks["other"] / 10)


def test_a_refusal_counts_for_a_while() -> None:
    shares = Shares()
    shares.take("a", 60)
    shares.refused("b", 0.0)
    assert shares.is_above("a", 29.0)
    assert not shares.is_above("a", 31.0)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), max_size=30))
def test_all_that_is_given_back_leaves_nothing(taken: list[tuple[str, int]]) -> None:
    shares = Shares()
    for tenant, pages in taken:
        shares.take(tenant, pages)
        shares.refused(tenant, 0.0)
    for tenant, pages in taken:
        shares.give_back(tenant, pages)
    assert not shares.is_above("a", 100.0)
    assert (shares._held, shares._weight, shares._pages) == (0, 0.0, {})


def test_the_memory_of_refusals_is_bounded_though_nobody_asks_for_shares() -> None:
    shares = Shares()
    for index in range(10_000):
        shares.refused(f"t{index}", 0.01 * index)
    assert len(shares._refused_at) <= 4097
