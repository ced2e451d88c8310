"""Which workers a request goes to."""

from dataclasses import replace

import pytest

from perigee.kvstore.messages import BlockEvent
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.events import BlockEvents
from perigee.scheduler.ids import NodeId, WorkerId
from tests.scheduler.cluster import PROFILE, Cluster, keys, one_of_each

LEFT, RIGHT = NodeId("left"), NodeId("right")


def two_hosts(profile: CostProfile = PROFILE) -> Cluster:
    """A prefill and a decode worker on each of two hosts."""
    cluster = Cluster(profile)
    for node in (LEFT, RIGHT):
        cluster.add_store(node)
        cluster.add_worker(f"p-{node}", "prefill", node)
        cluster.add_worker(f"d-{node}", "decode", node)
    return cluster


def hold(cluster: Cluster, node: NodeId, num_tokens: int) -> None:
    """The node now has this much of the default prompt."""
    events = tuple(BlockEvent(True, key) for key in keys(num_tokens))
    cluster.hear(BlockEvents(node, "1", 0, events, snapshot=True))


def test_a_dispatch_says_where_both_workers_are_and_what_to_expect() -> None:
    dispatch = one_of_each().dispatch("r", num_tokens=1000, max_tokens=100)
    assert (dispatch.prefill.id, dispatch.prefill.address, dispatch.prefill.incarnation) == ("p0", "unix:/p0", "1")
    assert dispatch.decode.id == "d0"
    assert (dispatch.prefill_source, dispatch.decode_source) == ("", "")
    assert dispatch.predicted_ttft_s == pytest.approx(1.0)
    assert dispatch.predicted_tbt_s == pytest.approx(0.01 + 0.001 + 0.001)


def test_a_cached_prefix_shortens_the_predicted_ttft() -> None:
    cluster = one_of_each()
    cluster.add_store(held=keys(960))
    # 40 tokens to compute, and 960 to load.
    assert cluster.dispatch("r", num_tokens=1000).predicted_ttft_s == pytest.approx(0.04 + 0.0096)


def test_a_wholly_cached_prompt_still_computes_its_last_token() -> None:
    cluster = one_of_each()
    cluster.add_store(held=keys(1000))
    assert cluster.dispatch("r", num_tokens=1000).predicted_ttft_s == pytest.approx(0.001 + 0.00999)


@pytest.mark.parametrize("node", [LEFT, RIGHT])
def test_prefill_goes_where_the_prefix_is(node: NodeId) -> None:
    cluster = two_hosts()
    hold(cluster, node, 960)
    dispatch = cluster.dispatch("r", num_tokens=1000)
    assert (dispatch.prefill.id, dispatch.prefill_source) == (f"p-{node}", "")


def test_past_a_long_queue_the_other_node_pulls_the_cached_prefix() -> None:
    cluster = two_hosts()
    hold(cluster, LEFT, 960)
    cluster.report("p-left", "prefill", queued_prefill_tokens=5000)
    dispatch = cluster.dispatch("r", num_tokens=1000)
    assert (dispatch.prefill.id, dispatch.prefill_source) == ("p-right", LEFT)
    # 40 tokens to compute, after 960 were pulled and loaded.
    assert dispatch.predicted_ttft_s == pytest.approx(0.04 + 0.0096 + 0.002 + 0.0192)


def test_what_is_faster_computed_than_pulled_is_computed() -> None:
    cluster = two_hosts(replace(PROFILE, prefill_token_s=1e-5))
    hold(cluster, LEFT, 960)
    cluster.report("p-left", "prefill", queued_prefill_tokens=5000)
    dispatch = cluster.dispatch("r", num_tokens=1000)
    assert (dispatch.prefill.id, dispatch.prefill_source) == ("p-right", "")
    assert dispatch.predicted_ttft_s == pytest.approx(0.01)


def test_decode_stays_on_the_store_node_of_prefill_where_others_are_no_better() -> None:
    cluster = two_hosts()
    for index, node in enumerate([LEFT, RIGHT] * 2):
        hold(cluster, node, 960)
        dispatch = cluster.dispatch(f"r{index}", num_tokens=1000)
        assert (dispatch.decode.id, dispatch.decode_source) == (f"d-{dispatch.prefill.id[2:]}", "")
        cluster.finish(f"r{index}")


@pytest.mark.parametrize("busy", [{"running_sequences": 4, "context_tokens": 9000}, {"running_sequences": 8}])
def test_decode_of_a_busy_store_node_goes_to_another_which_pulls_the_blocks(busy: dict[str, int]) -> None:
    cluster = two_hosts()
    hold(cluster, LEFT, 960)
    cluster.report("d-left", "decode", **busy)
    dispatch = cluster.dispatch("r", num_tokens=1000)
    assert (dispatch.prefill.id, dispatch.decode.id, dispatch.decode_source) == ("p-left", "d-right", LEFT)


def test_workers_that_differ_by_less_than_predictions_can_tell_take_turns() -> None:
    cluster = one_of_each(prefill=2, decode=2)
    view = cluster.conductor.view
    view.workers[WorkerId("p1")].cost.prefill.factor = 1.02
    view.workers[WorkerId("d1")].cost.step.factor = 1.02
    for name in ("p1", "d1"):
        view.fleet.refresh(view.workers[WorkerId(name)])
    chosen = []
    for index in range(4):
        dispatch = cluster.dispatch(f"r{index}")
        chosen.append((dispatch.prefill.id, dispatch.decode.id))
        cluster.finish(f"r{index}")
    assert chosen == [("p0", "d0"), ("p1", "d1")] * 2


def test_prompts_spread_over_prefill_workers_before_any_of_them_reports() -> None:
    cluster = one_of_each(prefill=3)
    chosen = [cluster.dispatch(f"r{index}", salt=index).prefill.id for index in range(6)]
    assert chosen == ["p0", "p1", "p2", "p0", "p1", "p2"]


def test_sequences_spread_over_decode_workers_before_any_of_them_reports() -> None:
    cluster = one_of_each(decode=2)
    chosen = [cluster.dispatch(f"r{index}").decode.id for index in range(4)]
    assert chosen == ["d0", "d1", "d0", "d1"]


def test_among_equals_whoever_was_chosen_least_recently_is_next() -> None:
    cluster = one_of_each(prefill=2, decode=2)
    for index in range(4):
        dispatch = cluster.dispatch(f"r{index}")
        assert (dispatch.prefill.id, dispatch.decode.id) == (f"p{index % 2}", f"d{index % 2}")
        cluster.finish(f"r{index}")


def test_a_long_prompt_makes_the_next_ones_go_elsewhere() -> None:
    cluster = one_of_each(prefill=2)
    cluster.report("d0", "decode", free_pages=1000, total_pages=1000)
    assert cluster.dispatch("long", num_tokens=2000).prefill.id == "p0"
    short = [cluster.dispatch(f"short{index}", num_tokens=500, salt=1 + index).prefill.id for index in range(4)]
    assert short == ["p1"] * 4


def test_a_queue_is_counted_once_though_placed_and_reported() -> None:
    cluster = one_of_each()
    cluster.dispatch("first", num_tokens=1000)
    cluster.report("p0", "prefill", queued_sequences=1, queued_prefill_tokens=1000)
    assert cluster.dispatch("second", num_tokens=500, salt=1).predicted_ttft_s == pytest.approx(1.5)


def test_what_a_worker_has_computed_of_its_queue_no_longer_counts() -> None:
    cluster = one_of_each()
    cluster.dispatch("first", num_tokens=1000)
    cluster.now += 2.0
    cluster.report("p0", "prefill", running_sequences=1, queued_prefill_tokens=300)
    assert cluster.dispatch("second", num_tokens=500, salt=1).predicted_ttft_s == pytest.approx(0.8)


def test_a_queue_that_others_made_counts() -> None:
    cluster = one_of_each(prefill=2)
    cluster.report("p0", "prefill", queued_prefill_tokens=5000)
    assert cluster.dispatch("r").prefill.id == "p1"


def test_a_finished_prefill_leaves_the_queue_and_one_that_waits_does_not() -> None:
    cluster = one_of_each()
    cluster.dispatch("first", num_tokens=1000)
    cluster.dispatch("second", num_tokens=1000, salt=1)
    cluster.prefill_done("first")
    assert cluster.dispatch("third", num_tokens=1000, salt=2).predicted_ttft_s == pytest.approx(2.0)


def test_decode_goes_to_the_lowest_predicted_tbt() -> None:
    cluster = one_of_each(decode=2)
    cluster.report("d0", "decode", running_sequences=3, context_tokens=100)
    cluster.report("d1", "decode", running_sequences=2, context_tokens=5000)
    assert cluster.dispatch("r").decode.id == "d0"


def test_decode_goes_where_there_is_room_even_if_it_is_slower() -> None:
    cluster = one_of_each(decode=2)
    cluster.report("d0", "decode", free_pages=2, total_pages=100)
    cluster.report("d1", "decode", running_sequences=7, context_tokens=50_000)
    assert cluster.dispatch("r", num_tokens=64, max_tokens=32).decode.id == "d1"


def test_a_slow_worker_is_given_less() -> None:
    cluster = one_of_each(prefill=2)
    cluster.report("d0", "decode", free_pages=1000, total_pages=1000)
    assert cluster.dispatch("r0", num_tokens=1000).prefill.id == "p0"
    cluster.prefill_done("r0", compute_s=10.0)
    # p1 has not been measured, and p0 proved ten times as slow as expected.
    assert [cluster.dispatch(f"r{i}", num_tokens=1000, salt=i).prefill.id for i in range(1, 4)] == ["p1"] * 3


def test_a_mixed_worker_does_both_phases() -> None:
    cluster = Cluster()
    cluster.add_store()
    cluster.add_worker("m0", "mixed")
    dispatch = cluster.dispatch("r")
    assert (dispatch.prefill, dispatch.decode_source) == (dispatch.decode, "")


def test_a_mixed_worker_never_takes_one_phase_alone() -> None:
    cluster = one_of_each()
    cluster.add_worker("m0", "mixed")
    pairs = [cluster.dispatch(f"r{index}", num_tokens=500, salt=index) for index in range(4)]
    assert {(each.prefill.id, each.decode.id) for each in pairs} == {("p0", "d0"), ("m0", "m0")}


def test_a_mixed_worker_without_room_leaves_the_request_to_the_others() -> None:
    cluster = one_of_each()
    cluster.add_worker("m0", "mixed", free_pages=0, total_pages=100)
    cluster.report("p0", "prefill", queued_prefill_tokens=100_000)
    assert cluster.dispatch("r").prefill.id == "p0"
