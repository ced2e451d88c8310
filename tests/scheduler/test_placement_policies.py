"""What the placement policies do differently, and what they share."""

from dataclasses import replace

import pytest

from perigee.kvstore.messages import BlockEvent, Tier
from perigee.scheduler.commands import Dispatch
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.events import BlockEvents
from perigee.scheduler.ids import NodeId, WorkerId
from perigee.scheduler.policies import PLACEMENTS, make_policies
from tests.scheduler.cluster import BLOCK_TOKENS, PROFILE, Cluster, keys

NODES = [NodeId(name) for name in ("a", "b", "c", "d")]
ALL = sorted(PLACEMENTS)


def hosts(placement: str, count: int = 4, **profile: float) -> Cluster:
    """A prefill and a decode worker on each of some hosts: `p-a` and `d-a` on `a`, and so on."""
    cluster = Cluster(replace(PROFILE, **profile))
    cluster.conductor = Conductor(make_policies(placement), replace(PROFILE, **profile))
    for node in NODES[:count]:
        cluster.add_store(node)
        cluster.add_worker(f"p-{node}", "prefill", node)
        cluster.add_worker(f"d-{node}", "decode", node, free_pages=1000, total_pages=1000, max_sequences=100)
    return cluster


def hold(cluster: Cluster, node: str, num_tokens: int, tier: Tier = Tier.DRAM) -> None:
    """The node now has this much of the default prompt, and nothing else."""
    events = tuple(BlockEvent(True, key, tier) for key in keys(num_tokens))
    cluster.hear(BlockEvents(NodeId(node), "1", 0, events, snapshot=True))


def busy(cluster: Cluster, *nodes: str, queued: int = 100_000) -> None:
    """The prefill workers of these nodes have long queues."""
    for node in nodes:
        cluster.report(f"p-{node}", "prefill", queued_prefill_tokens=queued)


def places(dispatch: Dispatch) -> tuple[str, str]:
    return dispatch.prefill.id, dispatch.prefill_source


# ---- baselines


@pytest.mark.parametrize("placement", ALL)
def test_every_policy_uses_what_the_chosen_worker_has_at_hand(placement: str) -> None:
    cluster = hosts(placement, 1)
    hold(cluster, "a", 960)
    dispatch = cluster.dispatch("r", num_tokens=1000)
    assert places(dispatch) == ("p-a", "")
    assert dispatch.predicted_ttft_s == pytest.approx(0.04 + 0.0096)


@pytest.mark.parametrize("placement", ALL)
def test_every_policy_keeps_a_mixed_workers_phases_together(placement: str) -> None:
    cluster = hosts(placement, 2)
    cluster.add_worker("m", "mixed", NODES[0], free_pages=1000, total_pages=1000, max_sequences=100)
    pairs = [cluster.dispatch(f"r{index}", salt=index) for index in range(12)]
    assert {(pair.prefill.id == "m") == (pair.decode.id == "m") for pair in pairs} == {True}


def test_random_spreads_and_draws_the_same_for_the_same_request() -> None:
    first, second = hosts("random"), hosts("random")
    drawn = [places(first.dispatch(f"r{index}")) for index in range(40)]
    assert {worker for worker, _ in drawn} == {"p-a", "p-b", "p-c", "p-d"}
    assert [places(second.dispatch(f"r{index}")) for index in range(40)] == drawn


def test_round_robin_goes_from_one_to_the_next_whatever_they_have_to_do() -> None:
    cluster = hosts("round-robin")
    busy(cluster, "b")
    chosen = [cluster.dispatch(f"r{index}") for index in range(5)]
    assert [each.prefill.id for each in chosen] == ["p-a", "p-b", "p-c", "p-d", "p-a"]
    assert [each.decode.id for each in chosen] == ["d-a", "d-b", "d-c", "d-d", "d-a"]


def test_least_loaded_takes_the_shortest_queue_though_another_has_the_prefix() -> None:
    cluster = hosts("least-loaded", 2)
    hold(cluster, "a", 960)
    busy(cluster, "a", queued=100)
    cluster.report("d-a", "decode", running_sequences=1, free_pages=1000, total_pages=1000, max_sequences=100)
    dispatch = cluster.dispatch("r", num_tokens=1000)
    assert (places(dispatch), dispatch.decode.id) == (("p-b", ""), "d-b")


# ---- fetching


def test_local_cache_never_fetches() -> None:
    cluster = hosts("local-cache", 2)
    hold(cluster, "a", 960)
    assert places(cluster.dispatch("here", num_tokens=1000)) == ("p-a", "")
    busy(cluster, "a")
    assert places(cluster.dispatch("there", num_tokens=1000)) == ("p-b", "")


@pytest.mark.parametrize(("held", "source"), [(640, "a"), (672, "")])
def test_global_cache_fetches_where_the_best_prefix_is_longer_by_the_threshold(held: int, source: str) -> None:
    cluster = hosts("global-cache", 2, transfer_token_s=10.0)  # it does not ask what that costs
    hold(cluster, "a", 960)
    hold(cluster, "b", held)
    busy(cluster, "a", queued=10_000_000)
    assert places(cluster.dispatch("r", num_tokens=1000)) == ("p-b", source)


@pytest.mark.parametrize(("transfer_token_s", "source"), [(9e-4, "a"), (1.1e-3, "")])
def test_perigee_fetches_exactly_where_that_is_faster(transfer_token_s: float, source: str) -> None:
    cluster = hosts("perigee", 2, transfer_token_s=transfer_token_s, transfer_fixed_s=0.0, load_token_s=0.0)
    hold(cluster, "a", 960)
    busy(cluster, "a")
    assert places(cluster.dispatch("r", num_tokens=1000)) == ("p-b", source)


def test_only_what_is_lacking_is_fetched() -> None:
    cluster = hosts("perigee", 2)
    hold(cluster, "a", 960)
    hold(cluster, "b", 640)
    busy(cluster, "a")
    dispatch = cluster.dispatch("r", num_tokens=1000)
    assert places(dispatch) == ("p-b", "a")
    assert dispatch.predicted_ttft_s == pytest.approx(0.04 + 960e-5 + 0.002 + 320 * 2e-5)


def test_a_holder_that_sends_already_is_passed_over_for_another_one() -> None:
    cluster = hosts("perigee", transfer_token_s=5e-4)
    for node in ("a", "b"):
        hold(cluster, node, 960)
    busy(cluster, "a", "b")
    chosen = [places(cluster.dispatch(f"r{index}", num_tokens=1000)) for index in range(2)]
    assert chosen == [("p-c", "a"), ("p-d", "b")]


def test_transfers_in_flight_make_the_next_ones_wait_until_they_are_over() -> None:
    cluster = hosts("perigee", 3, transfer_token_s=4e-4)
    hold(cluster, "a", 960)
    busy(cluster, "a")
    first = cluster.dispatch("first", num_tokens=1000)
    second = cluster.dispatch("second", num_tokens=1000)
    assert (first.prefill_source, second.prefill_source) == ("a", "a")
    assert second.predicted_ttft_s == pytest.approx(first.predicted_ttft_s + 0.002 + 960 * 4e-4)
    for request in ("first", "second"):
        cluster.prefill_done(request)
        cluster.finish(request)
    cluster.now += 2.0
    assert cluster.dispatch("third", num_tokens=1000).predicted_ttft_s == pytest.approx(first.predicted_ttft_s)


def test_a_free_holder_of_less_is_better_than_a_busy_one_of_more() -> None:
    cluster = hosts("perigee", transfer_token_s=5e-4)
    hold(cluster, "a", 992)
    hold(cluster, "b", 928)
    busy(cluster, "a", "b")
    chosen = [places(cluster.dispatch(f"r{index}", num_tokens=1000)) for index in range(2)]
    assert chosen == [("p-c", "a"), ("p-d", "b")]


def test_blocks_on_ssd_cost_more_than_blocks_in_memory() -> None:
    cluster = hosts("perigee", 2, promote_token_s=5e-4)
    hold(cluster, "a", 960, Tier.SSD)
    dispatch = cluster.dispatch("from-ssd", num_tokens=1000)
    assert places(dispatch) == ("p-a", "")
    assert dispatch.predicted_ttft_s == pytest.approx(0.04 + 960e-5 + 960 * 5e-4)
    hold(cluster, "b", 960)
    assert places(cluster.dispatch("from-memory", num_tokens=1000)) == ("p-b", "")


def test_the_source_is_a_node_that_need_not_read_its_ssd() -> None:
    cluster = hosts("perigee", promote_token_s=5e-4)
    hold(cluster, "a", 960, Tier.SSD)
    hold(cluster, "b", 960)
    busy(cluster, "a", "b")
    assert places(cluster.dispatch("r", num_tokens=1000)) == ("p-c", "b")


# ---- queues


def test_a_long_context_counts_for_what_it_takes_not_for_its_tokens() -> None:
    cluster = hosts("perigee", 2, prefill_pair_s=1e-6)
    prompts = [("long", 3000), *((f"short{index}", 1200) for index in range(3))]  # 7.5 s, and 1.92 s each
    chosen = [
        cluster.dispatch(name, num_tokens, salt=salt).prefill.id for salt, (name, num_tokens) in enumerate(prompts)
    ]
    assert chosen == ["p-a", "p-b", "p-b", "p-b"]
    assert cluster.dispatch("last", num_tokens=100, salt=9).prefill.id == "p-b"


def test_what_is_done_of_the_first_prompt_by_now_does_not_count() -> None:
    cluster = hosts("perigee", 1)
    cluster.dispatch("first", num_tokens=2000)
    cluster.now += 1.5
    assert cluster.dispatch("second", num_tokens=100, salt=1).predicted_ttft_s == pytest.approx(0.6)
    cluster.now += 10.0  # the first takes longer than predicted: it is not said to be done before its time
    cluster.report("p-a", "prefill", queued_prefill_tokens=100)
    cluster.report("d-a", "decode", free_pages=1000, total_pages=1000, max_sequences=100)
    assert cluster.dispatch("third", num_tokens=100, salt=2).predicted_ttft_s == pytest.approx(0.2)


def test_prompts_that_would_go_later_are_not_waited_for() -> None:
    cluster = hosts("perigee", 1)
    for index in range(4):
        cluster.dispatch(f"r{index}", num_tokens=1000, salt=index)
    view = cluster.conductor.view
    ranks = sorted(request.rank for request in view.requests.values())
    row = view.workers[WorkerId("p-a")].row
    waits = [float(view.fleet.queue_s(rank, cluster.now)[row]) for rank in (ranks[0] - 1, *ranks)]
    assert waits[0] == 0.0
    assert waits == sorted(waits)
    assert waits[-1] == pytest.approx(4.0)


def test_where_many_wait_a_worker_is_left_to_those_who_have_their_prefix_there() -> None:
    """The price of a worker's time: alone, the prompt would be done a little sooner where nothing of it is cached."""
    cluster = hosts("perigee", 2, transfer_token_s=1.0)
    hold(cluster, "a", 960)
    for node in ("a", "b"):
        for index in range(6):
            cluster.dispatch(f"{node}{index}", num_tokens=3000, salt=1 + index + 10 * NODES.index(NodeId(node)))
    busy(cluster, "a", queued=3000 * 6 + 1100)
    assert cluster.dispatch("r", num_tokens=1000).prefill.id == "p-a"


# ---- decode and receipts


def test_decode_goes_to_a_holder_of_the_conversation_where_others_are_no_better() -> None:
    cluster = hosts("perigee")
    hold(cluster, "c", 640)
    cluster.add_worker("p-x", "prefill", NODES[0])
    for node in NODES:
        cluster.report(f"p-{node}", "prefill", draining=True)
    cluster.report("d-a", "decode", draining=True)
    dispatch = cluster.dispatch("r", num_tokens=1000)
    assert (dispatch.prefill.id, dispatch.decode.id, dispatch.decode_source) == ("p-x", "d-c", "a")


def test_a_plan_names_the_best_alternatives_with_hits_by_tier() -> None:
    cluster = hosts("perigee", promote_token_s=1e-4)
    hold(cluster, "a", 960)
    hold(cluster, "b", 640, Tier.SSD)
    cluster.dispatch("r", num_tokens=1000)
    (attempt,) = cluster.conductor.receipts.find("r")[0].attempts
    assert attempt.plan is not None
    assert attempt.plan.prefill.worker.id == "p-a"
    others = {each.worker.id: each for each in attempt.plan.considered}
    assert set(others) == {"p-b", "p-c", "p-d"}
    assert (others[WorkerId("p-b")].ssd_tokens, others[WorkerId("p-b")].remote_tokens) == (640, 320)
    assert (
        others[WorkerId("p-c")].ssd_tokens,
        others[WorkerId("p-c")].remote_tokens,
        others[WorkerId("p-c")].source,
    ) == (0, 960, "a")
    assert [each.seconds for each in attempt.plan.considered] == sorted(each.seconds for each in others.values())


def test_one_choice_among_many_workers_is_that_of_looking_at_each() -> None:
    """What is worked out for many workers at once agrees with what is said of each alone."""
    cluster = hosts("perigee")
    hold(cluster, "a", 960)
    hold(cluster, "b", 320)
    hold(cluster, "c", 640, Tier.SSD)
    for index in range(30):
        plan_before = cluster.dispatch(f"r{index}", num_tokens=1000 + BLOCK_TOKENS * index)
        (attempt,) = cluster.conductor.receipts.find(f"r{index}")[0].attempts
        assert attempt.plan is not None
        chosen = attempt.plan.prefill
        assert plan_before.predicted_ttft_s == pytest.approx(chosen.queue_s + chosen.work_s)
