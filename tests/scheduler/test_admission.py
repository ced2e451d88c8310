"""Who is let in, and what the others are told."""

from dataclasses import replace

import pytest

from perigee.scheduler.commands import RejectReason
from perigee.scheduler.events import BlockEvents, StoreLost, WorkerLost
from perigee.scheduler.ids import NodeId, WorkerId
from perigee.scheduler.worker_view import Demand
from perigee.workers.engine.batcher import Batcher, BatchLimits
from perigee.workers.engine.pages import PagePool
from perigee.workers.engine.sequence import Ref, Sampling, Sequence
from tests.scheduler.cluster import BLOCK_TOKENS, CARD, STORE, Cluster, one_of_each


def full(pages: int = 6, max_sequences: int = 8) -> Cluster:
    """One prefill worker, and one decode worker on which two of the default requests were placed."""
    cluster = one_of_each(decode=0)
    cluster.add_worker("d0", "decode", free_pages=pages, total_pages=pages, max_sequences=max_sequences)
    cluster.dispatch("a")
    cluster.dispatch("b")
    return cluster


def test_overload_when_no_decode_worker_has_pages() -> None:
    cluster = full()
    reject = cluster.reject("c")
    assert reject.reason is RejectReason.OVERLOAD
    # What it would come to, were it let in: two prompts of 64 tokens before it, two sequences beside it.
    assert reject.predicted_ttft_s == pytest.approx(3 * 0.064)
    assert reject.predicted_tbt_s == pytest.approx(0.01 + 3 * 0.001 + 3 * 64e-6)


def test_overload_when_no_decode_worker_has_a_place_in_its_batch() -> None:
    assert full(pages=100, max_sequences=2).reject("c").reason is RejectReason.OVERLOAD


def test_pages_count_all_tokens_that_may_come() -> None:
    cluster = one_of_each(decode=0)
    cluster.add_worker("d0", "decode", free_pages=10, total_pages=10)
    cluster.dispatch("a", num_tokens=100, max_tokens=93)  # six pages, for the last token is never computed
    assert cluster.reject("b", num_tokens=100, max_tokens=30).reason is RejectReason.OVERLOAD  # five
    cluster.dispatch("c", num_tokens=100, max_tokens=29)  # four


def test_tokens_past_the_models_context_are_not_counted() -> None:
    cluster = Cluster()
    cluster.add_store()
    cluster.add_worker("m0", "mixed", free_pages=10, total_pages=10, card=replace(CARD, max_context=320))
    cluster.dispatch("r", num_tokens=64, max_tokens=1_000_000)


def test_a_finished_request_makes_room() -> None:
    cluster = full()
    cluster.reject("c")
    cluster.finish("a")
    cluster.dispatch("c", attempt=1)
    assert cluster.reject("d").reason is RejectReason.OVERLOAD


def test_a_report_that_shows_what_was_placed_counts_it_once() -> None:
    cluster = one_of_each(decode=0)
    cluster.add_worker("d0", "decode", free_pages=6, total_pages=6)
    cluster.dispatch("a")
    cluster.report("d0", "decode", running_sequences=1, free_pages=3, total_pages=6)
    cluster.dispatch("b")


def test_what_has_just_ended_is_not_taken_for_somebody_elses() -> None:
    cluster = one_of_each(decode=0)
    cluster.add_worker("d0", "decode", free_pages=3, total_pages=3)
    cluster.dispatch("a")
    cluster.finish("a")
    cluster.report("d0", "decode", running_sequences=1, free_pages=0, total_pages=3)  # on its way before that
    cluster.dispatch("b")
    cluster.finish("b")
    cluster.now += 1.0
    cluster.report("d0", "decode", running_sequences=1, free_pages=0, total_pages=3)
    assert cluster.reject("c").reason is RejectReason.OVERLOAD


def test_what_others_placed_on_a_worker_counts() -> None:
    cluster = one_of_each(decode=0)
    cluster.add_worker("d0", "decode", running_sequences=1, free_pages=2, total_pages=6)
    assert cluster.reject("a").reason is RejectReason.OVERLOAD


def test_retry_after_is_when_the_first_place_is_predicted_to_be_free() -> None:
    cluster = one_of_each(decode=0)
    cluster.add_worker("d0", "decode", free_pages=100, total_pages=100, max_sequences=1)
    for index in range(12):  # from which it learns how long answers are
        cluster.dispatch(f"earlier-{index}", num_tokens=1000, max_tokens=1000, salt=index)
        cluster.finish(f"earlier-{index}", output_tokens=200)
    dispatch = cluster.dispatch("a", num_tokens=1000, max_tokens=1000, salt=100)
    drain_s = dispatch.predicted_ttft_s + 200 * dispatch.predicted_tbt_s
    assert cluster.reject("b").retry_after_s == pytest.approx(drain_s, rel=0.05)
    cluster.now += dispatch.predicted_ttft_s
    cluster.prefill_done("a")
    cluster.joined("a")
    cluster.now += 0.5
    assert cluster.reject("b").retry_after_s == pytest.approx(drain_s - dispatch.predicted_ttft_s - 0.5, rel=0.05)


def test_retry_after_stays_between_a_second_and_a_minute() -> None:
    cluster = full()
    assert cluster.reject("c").retry_after_s == 1.0
    foreign = one_of_each(decode=0)
    foreign.add_worker("d0", "decode", running_sequences=8)
    assert foreign.reject("c").retry_after_s == 60.0


def test_too_large_when_no_decode_worker_could_ever_hold_it() -> None:
    cluster = one_of_each(decode=2)
    reject = cluster.reject("r", num_tokens=3000, max_tokens=202)
    assert (reject.reason, reject.retry_after_s) == (RejectReason.TOO_LARGE, 0.0)
    assert "101 pages" in reject.message
    assert "has 100" in reject.message
    cluster.dispatch("r", num_tokens=3000, max_tokens=201, attempt=1)


def test_too_large_when_no_prefill_worker_could_ever_hold_the_prompt() -> None:
    cluster = one_of_each(prefill=0)
    cluster.add_worker("p0", "prefill", free_pages=10, total_pages=10)
    reject = cluster.reject("r", num_tokens=321)
    assert reject.reason is RejectReason.TOO_LARGE
    assert reject.message == "the prompt takes 11 pages of KVCache; the largest prefill worker has 10"
    cluster.dispatch("r", num_tokens=320, max_tokens=1000, attempt=1)


def test_not_too_large_for_good_while_a_worker_that_could_hold_it_takes_no_work() -> None:
    cluster = one_of_each()
    cluster.add_worker("big", "decode", free_pages=1000, total_pages=1000)
    cluster.report("big", "decode", free_pages=1000, total_pages=1000, draining=True)
    reject = cluster.reject("r", num_tokens=3000, max_tokens=3000)
    assert reject.reason is RejectReason.UNAVAILABLE
    assert reject.retry_after_s > 0
    cluster.hear(WorkerLost(WorkerId("big"), "1"))
    assert cluster.reject("r", num_tokens=3000, max_tokens=3000).reason is RejectReason.TOO_LARGE


def test_a_worker_without_a_place_for_any_sequence_gets_nothing() -> None:
    cluster = one_of_each(decode=0)
    cluster.add_worker("d0", "decode", max_sequences=0)
    assert cluster.reject("r").reason is RejectReason.UNAVAILABLE
    cluster.add_worker("d1", "decode")
    assert cluster.dispatch("r", attempt=1).decode.id == "d1"


@pytest.mark.parametrize(("num_tokens", "max_tokens"), [(1, 0), (32, 1), (32, 2), (33, 31), (33, 32), (600, 5000)])
def test_pages_are_those_that_a_worker_will_take(num_tokens: int, max_tokens: int) -> None:
    max_context = 1000
    sequence = Sequence(Ref("r"), (1,) * num_tokens, num_tokens, (), Sampling(max_tokens=max_tokens))
    batcher = Batcher(PagePool(100, BLOCK_TOKENS), BatchLimits(64, 8, max_context), frozenset())
    demand = Demand.of(num_tokens, min(num_tokens + max_tokens, max_context), BLOCK_TOKENS)
    assert demand.prompt_pages == batcher.pages_needed(sequence, one_token=True)
    assert demand.pages == batcher.pages_needed(sequence, one_token=False)


def test_too_large_when_no_store_node_has_slots_for_the_blocks_of_the_prompt() -> None:
    cluster = one_of_each()
    cluster.add_store(num_slots=10)
    reject = cluster.reject("r", num_tokens=321)
    assert (reject.reason, reject.retry_after_s) == (RejectReason.TOO_LARGE, 0.0)
    assert reject.message == (
        "the prompt has 11 blocks of KVCache; the largest store node of a prefill worker has 10 slots"
    )
    cluster.dispatch("r", num_tokens=320, max_tokens=1000, attempt=1)


def test_too_many_blocks_names_the_phase_whose_store_nodes_are_too_small() -> None:
    cluster = Cluster()
    for node, num_slots, role in ((NodeId("large"), 100, "prefill"), (NodeId("small"), 10, "decode")):
        cluster.add_store(node, num_slots=num_slots)
        cluster.add_worker(role, role, node)
    assert "the largest store node of a decode worker has 10 slots" in cluster.reject("r", num_tokens=321).message


def test_a_prompt_goes_to_the_store_node_that_has_slots_for_it() -> None:
    cluster = Cluster()
    for node, num_slots in ((NodeId("small"), 10), (NodeId("large"), 11)):
        cluster.add_store(node, num_slots=num_slots)
        cluster.add_worker(f"m-{node}", "mixed", node)
    cluster.report("m-large", "mixed", queued_prefill_tokens=5000)
    assert cluster.dispatch("short", num_tokens=320).prefill.id == "m-small"
    assert cluster.dispatch("long", num_tokens=321).prefill.id == "m-large"


def test_a_store_node_that_does_not_know_its_slots_yet_refuses_nothing() -> None:
    cluster = one_of_each()
    cluster.dispatch("r", num_tokens=3000)


def test_the_slots_of_a_store_node_may_become_known_without_any_block() -> None:
    cluster = one_of_each()
    cluster.hear(BlockEvents(STORE, "1", 0, (), num_slots=10))
    assert cluster.reject("r", num_tokens=321).reason is RejectReason.TOO_LARGE


def test_workers_for_the_two_phases_may_be_on_two_store_nodes() -> None:
    cluster = Cluster()
    for node, role in ((NodeId("left"), "prefill"), (NodeId("right"), "decode")):
        cluster.add_store(node)
        cluster.add_worker(role, role, node)
    assert cluster.conductor.view.ready(cluster.now)
    dispatch = cluster.dispatch("r")
    assert (dispatch.prefill_source, dispatch.decode_source) == ("", "left")


def test_a_request_goes_to_the_one_worker_that_is_large_enough() -> None:
    cluster = one_of_each(decode=2)
    cluster.add_worker("big", "decode", running_sequences=3, free_pages=1000, total_pages=1000)
    assert cluster.dispatch("r", num_tokens=3000, max_tokens=3000).decode.id == "big"


@pytest.mark.parametrize(
    ("prefill", "decode", "missing"),
    [(0, 0, "no prefill and no decode"), (1, 0, "no decode"), (0, 1, "no prefill")],
)
def test_unavailable_without_a_worker_for_each_phase(prefill: int, decode: int, missing: str) -> None:
    cluster = one_of_each(prefill, decode)
    reject = cluster.reject("r")
    assert reject.reason is RejectReason.UNAVAILABLE
    assert missing in reject.message
    assert reject.retry_after_s > 0
    assert not cluster.conductor.view.ready(cluster.now)


def test_ready_with_a_worker_for_each_phase() -> None:
    cluster = one_of_each()
    assert cluster.conductor.view.ready(cluster.now)


def test_unavailable_while_the_workers_store_node_is_not_known() -> None:
    cluster = Cluster()
    cluster.add_worker("m0", "mixed")
    assert cluster.reject("r").reason is RejectReason.UNAVAILABLE
    cluster.add_store()
    cluster.dispatch("r", attempt=1)
    cluster.hear(StoreLost(STORE, "1"))
    assert cluster.reject("s").reason is RejectReason.UNAVAILABLE


def test_a_draining_worker_gets_nothing_new() -> None:
    cluster = one_of_each()
    cluster.report("d0", "decode", draining=True)
    assert cluster.reject("r").reason is RejectReason.UNAVAILABLE


def test_a_worker_that_went_silent_gets_nothing_until_it_reports_again() -> None:
    cluster = one_of_each()
    cluster.now += 60.0
    cluster.report("p0", "prefill")
    assert cluster.reject("r").reason is RejectReason.UNAVAILABLE
    cluster.report("d0", "decode")
    cluster.dispatch("r", attempt=1)


def test_a_rejected_request_leaves_nothing_behind() -> None:
    cluster = full()
    before = cluster.conductor.view.workers[WorkerId("d0")].load
    cluster.reject("c")
    assert cluster.conductor.view.workers[WorkerId("d0")].load == before
    cluster.hear(WorkerLost(WorkerId("d0"), "1"))
    assert cluster.conductor.view.requests == {}
