"""What the admission policies let in, and when they turn away."""

from typing import Any

import pytest

from perigee.scheduler.admission.headroom import Headroom
from perigee.scheduler.admission.margin import Margin
from perigee.scheduler.commands import Dispatch, Proceed, Reject, RejectReason
from perigee.scheduler.ids import RequestKey, WorkerId
from perigee.scheduler.policies import ADMISSIONS
from perigee.scheduler.slo import Slo
from tests.scheduler.cluster import SERVER, Cluster, one_of_each, only

# With the tests' profile a step takes 10 ms, 1 ms a sequence, and 1 µs a token of context.
TBT = Slo(tbt_s=0.014)  # three short sequences, and not four


def cluster_of(admission: str, max_sequences: int = 8, decode: int = 1) -> Cluster:
    cluster = one_of_each(prefill=4, decode=0, admission=admission)
    for index in range(decode):
        cluster.add_worker(f"d{index}", "decode", max_sequences=max_sequences, free_pages=1000, total_pages=1000)
    return cluster


def start(cluster: Cluster, request_id: str, **arrival: Any) -> None:
    """It is let in, its prompt computed at once, and it decodes."""
    cluster.dispatch(request_id, **arrival)
    only(cluster.prefill_done(request_id), Proceed)
    cluster.joined(request_id)


@pytest.mark.parametrize("admission", sorted(ADMISSIONS))
def test_an_idle_cluster_serves_under_every_policy(admission: str) -> None:
    cluster = cluster_of(admission)
    start(cluster, "r", slo=Slo(10.0, 0.1))


@pytest.mark.parametrize("admission", ["at-decode", "early", "prediction", "perigee"])
def test_a_first_token_that_would_come_too_late_is_refused_at_arrival(admission: str) -> None:
    cluster = one_of_each(admission=admission)
    cluster.dispatch("before", num_tokens=2000)
    reject = cluster.reject("r", num_tokens=1000, slo=Slo(ttft_s=2.5))
    assert reject.reason is RejectReason.OVERLOAD
    assert "2.5 s" in reject.message
    assert reject.predicted_ttft_s == pytest.approx(3.0)
    assert reject.retry_after_s >= 1.0
    cluster.dispatch("patient", num_tokens=1000, slo=Slo(ttft_s=4.5))


def test_none_lets_everything_in() -> None:
    cluster = cluster_of("none", max_sequences=1)
    for index in range(5):
        start(cluster, f"r{index}", slo=Slo(0.001, 0.001))


def test_at_decode_computes_the_prompt_first_and_turns_away_then() -> None:
    cluster = cluster_of("at-decode")
    for index in range(3):
        start(cluster, f"r{index}", slo=TBT)
    cluster.dispatch("late", slo=TBT)
    reject = only(cluster.prefill_done("late"), Reject)
    assert reject.reason is RejectReason.OVERLOAD
    assert reject.retry_after_s >= 1.0
    assert RequestKey(SERVER, "late", 0) not in cluster.conductor.view.requests


def test_early_turns_away_at_arrival_by_who_decodes_now() -> None:
    cluster = cluster_of("early")
    for index in range(3):
        start(cluster, f"r{index}", slo=TBT)
    assert cluster.reject("late", slo=TBT).reason is RejectReason.OVERLOAD


def test_early_does_not_see_what_is_on_its_way() -> None:
    cluster = cluster_of("early")
    for index in range(6):
        cluster.dispatch(f"r{index}", slo=TBT)
    answers = [cluster.prefill_done(f"r{index}") for index in range(6)]
    assert [type(commands[0]) for commands in answers] == [Proceed] * 3 + [Reject] * 3


@pytest.mark.parametrize("admission", ["prediction", "perigee"])
def test_prediction_sees_what_is_on_its_way(admission: str) -> None:
    cluster = cluster_of(admission)
    admitted = [isinstance(cluster.arrive(f"r{index}", slo=TBT, max_tokens=2000)[0], Reject) for index in range(6)]
    assert not admitted[0]
    assert admitted[-1]


def test_prediction_takes_every_answer_to_be_as_long_as_the_mean() -> None:
    cluster = cluster_of("prediction")
    for index in range(3):
        start(cluster, f"r{index}", slo=TBT)
    cluster.finish("r0", output_tokens=101)  # a second, at 10 ms
    start(cluster, "again", slo=TBT)
    assert isinstance(cluster.arrive("soon", num_tokens=100, slo=TBT)[0], Reject)
    cluster.dispatch("later", num_tokens=1200, slo=TBT)  # its prompt takes longer than that


def test_the_default_refuses_by_the_tbt_promised_to_others() -> None:
    cluster = cluster_of("perigee")
    for index in range(2):
        start(cluster, f"strict{index}", slo=Slo(tbt_s=0.016), max_tokens=2000)
    lengths = [cluster.arrive(f"lax{index}", max_tokens=2000) for index in range(4)]
    assert isinstance(lengths[-1][0], Reject)


def test_who_is_refused_as_its_prompt_ends_is_told_when_the_others_will_have_made_room() -> None:
    cluster = cluster_of("at-decode", max_sequences=1)
    for index in range(12):  # from which it learns how long answers are
        start(cluster, f"earlier{index}", num_tokens=1000, max_tokens=1000, salt=index)
        cluster.finish(f"earlier{index}", output_tokens=200)
    dispatch = cluster.dispatch("first", num_tokens=1000, max_tokens=1000)
    cluster.dispatch("second", num_tokens=1000, max_tokens=1000)
    only(cluster.prefill_done("first"), Proceed)
    cluster.joined("first")
    cluster.now += 1.0
    left_s = 200 * dispatch.predicted_tbt_s - 1.0
    assert only(cluster.prefill_done("second"), Reject).retry_after_s == pytest.approx(left_s, rel=0.1)


def test_one_strict_promise_does_not_keep_others_off_the_workers_without_one() -> None:
    cluster = one_of_each(decode=2)
    start(cluster, "strict", slo=Slo(tbt_s=0.0135), max_tokens=300)
    lax = [cluster.arrive(f"lax{index}", max_tokens=300, salt=index)[0] for index in range(8)]
    chosen = [answer.decode.id for answer in lax if isinstance(answer, Dispatch)]
    assert len(chosen) == 8
    assert set(chosen[3:]) == {"d1"}


def test_a_prompt_that_waits_for_none_is_held_to_the_whole_ttft_whatever_its_priority() -> None:
    cluster = one_of_each()
    cluster.dispatch("r", num_tokens=950, priority=-1, slo=Slo(ttft_s=1.0))
    assert isinstance(cluster.arrive("waits", num_tokens=1, priority=-1, slo=Slo(ttft_s=1.0))[0], Reject)


def test_the_default_knows_that_answers_will_have_ended() -> None:
    cluster = cluster_of("perigee", max_sequences=4)
    slo = Slo(tbt_s=1.0)
    start(cluster, "first")
    cluster.finish("first", output_tokens=20)
    for index in range(4):
        start(cluster, f"r{index}", slo=slo, max_tokens=2000, salt=index)
    assert isinstance(cluster.arrive("soon", num_tokens=10, max_tokens=2000, slo=slo)[0], Reject)
    cluster.dispatch("later", num_tokens=3000, max_tokens=100, slo=slo)


def test_a_computed_prompt_is_thrown_away_for_more_work_of_others_and_not_for_less() -> None:
    for num_tokens, kind in ((3000, Proceed), (64, Reject)):
        cluster = cluster_of("perigee")
        cluster.dispatch("new", num_tokens=num_tokens, salt=9)  # promised nothing, let in while the worker was idle
        for index in range(2):
            start(cluster, f"r{index}", num_tokens=500, slo=Slo(tbt_s=0.025), max_tokens=2000, salt=index)
        view = cluster.conductor.view
        view.workers[WorkerId("d0")].cost.observe_step(3, 1500, 0.06)  # steps take longer than they were predicted to
        only(cluster.prefill_done("new"), kind)


def test_lower_priorities_are_refused_first_and_told_to_come_later() -> None:
    cluster = cluster_of("perigee", max_sequences=10)
    for index in range(9):
        start(cluster, f"r{index}", max_tokens=300, salt=index)
        cluster.now += 0.2
    low = cluster.reject("low", priority=-1)
    lower = cluster.reject("lower", priority=-2)
    cluster.dispatch("normal")
    full = cluster.reject("high", priority=1)
    assert low.retry_after_s <= lower.retry_after_s
    assert full.retry_after_s <= lower.retry_after_s


def test_those_that_are_refused_together_are_told_to_come_back_one_after_the_other() -> None:
    cluster = cluster_of("perigee", max_sequences=4)
    for index in range(4):
        start(cluster, f"r{index}", max_tokens=300 * (index + 1), salt=index)
    told = [cluster.reject(f"refused{index}").retry_after_s for index in range(4)]
    assert told == sorted(told)
    assert len(set(told)) >= 3


def test_a_tenant_above_its_share_is_refused_before_one_below_it() -> None:
    cluster = cluster_of("perigee", max_sequences=10)
    for index in range(10):
        start(cluster, f"greedy{index}", tenant="greedy", salt=index)
    cluster.reject("other", tenant="other")
    cluster.finish("greedy0")
    cluster.reject("greedy10", tenant="greedy")
    cluster.dispatch("other", attempt=1, tenant="other")


# ---- the parts


def test_headroom_counts_levels_that_asked_lately_and_the_default_always() -> None:
    headroom = Headroom()
    assert headroom.limit(0, False, 0.0) == 1.0
    assert headroom.limit(-3, False, 0.0) == pytest.approx(0.9)
    headroom.asked(5, 0.0)
    assert headroom.limit(0, False, 30.0) == pytest.approx(0.9)
    assert headroom.limit(-3, False, 30.0) == pytest.approx(0.8)
    assert headroom.limit(5, False, 30.0) == 1.0
    assert headroom.limit(0, False, 61.0) == 1.0
    assert headroom.limit(5, True, 0.0) == pytest.approx(0.9)


def test_at_least_a_half_is_for_everyone() -> None:
    headroom = Headroom()
    for priority in range(10):
        headroom.asked(priority, 0.0)
    assert headroom.limit(-1, True, 0.0) == 0.5


def test_the_margin_grows_with_misses_and_shrinks_with_hits() -> None:
    margin = Margin()
    for _ in range(100):
        margin.observe(missed=False)
    assert margin.sequences == 0.0
    margin.observe(missed=True)
    assert 0.1 < margin.sequences < 0.4
    for _ in range(200):
        margin.observe(missed=True)
    assert margin.sequences == 8.0
