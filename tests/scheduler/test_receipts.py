"""A receipt says what was decided, why, and what came of it."""

import json
import math
from dataclasses import replace

from perigee.kvstore.messages import BlockEvent, Tier
from perigee.scheduler.commands import Dispatch, Reject
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.events import BlockEvents, Cancelled, Finished, PrefillDone, RequestArrived, ServerLost, Tick
from perigee.scheduler.ids import ServerId
from perigee.scheduler.receipt_json import document
from perigee.scheduler.receipts import MAX_ATTEMPTS, PATIENCE_S, Outcome, Receipt
from perigee.scheduler.slo import Slo
from perigee.workers.engine.sequence import Ref
from tests.scheduler.cluster import PROFILE, SERVER, STORE, Cluster, keys, one_of_each, only


def receipt_of(cluster: Cluster, request_id: str) -> Receipt:
    (receipt,) = cluster.conductor.receipts.find(request_id)
    return receipt


def ended(cluster: Cluster) -> list[tuple[str, str]]:
    return [(receipt.request_id, receipt.outcome) for receipt in cluster.conductor.receipts.take_ended()]


def small(limit: int) -> Cluster:
    """A cluster whose Conductor keeps few receipts."""
    cluster = Cluster()
    cluster.conductor = Conductor(profile=PROFILE, num_receipts=limit)
    cluster.add_store()
    cluster.add_worker("p0", "prefill")
    cluster.add_worker("d0", "decode")
    return cluster


def test_a_request_that_was_served_has_the_prediction_beside_what_happened() -> None:
    cluster = one_of_each()
    request = RequestArrived(
        SERVER, Ref("r"), keys(64), 64, 32, age_s=0.5, tenant="anna", priority=3, slo=Slo(ttft_s=2.0)
    )
    dispatch = only(cluster.hear(request), Dispatch)
    cluster.now += 1
    cluster.prefill_done(
        "r",
        cached_tokens=48,
        queue_s=0.1,
        load_s=0.2,
        compute_s=0.3,
        ttft_s=0.6,
        cached_ssd_tokens=16,
        cached_remote_tokens=8,
    )
    cluster.joined("r")
    cluster.now += 1
    cluster.hear(Finished(SERVER, Ref("r"), 32, mean_tbt_s=0.02, max_tbt_s=0.07))
    shown = document(receipt_of(cluster, "r"), unix_offset_s=1000.0)
    assert json.loads(json.dumps(shown)) == shown
    (attempt,) = shown.pop("attempts")
    assert shown == {
        "request_id": "r",
        "choice": 0,
        "tenant": "anna",
        "priority": 3,
        "slo": {"ttft_s": 2.0, "tbt_s": None},
        "max_tokens": 32,
        "policies": {"placement": "perigee", "admission": "perigee"},
        "outcome": "finished",
        "forgotten_attempts": 0,
    }
    plan = attempt["plan"]
    assert plan["predicted_ttft_s"] == dispatch.predicted_ttft_s
    assert plan["predicted_tbt_s"] == dispatch.predicted_tbt_s
    assert (plan["prefill"]["worker"], plan["decode"]["worker"]) == ("p0", "d0")
    parts = ("queue_s", "transfer_s", "load_s", "compute_s")
    assert math.isclose(0.5 + sum(plan["prefill"][part] for part in parts), plan["predicted_ttft_s"])
    assert plan["prefill"]["new_tokens"] + sum(plan["prefill"]["prefix_tokens"].values()) == 64
    assert (attempt["at"], attempt["ended_at"], attempt["rank"]) == (1100.0, 1102.0, dispatch.rank)
    assert attempt["actual"] == {
        "ttft_s": 0.6,
        "queue_s": 0.1,
        "load_s": 0.2,
        "compute_s": 0.3,
        "cached_tokens": {"dram": 24, "ssd": 16, "remote": 8},
        "joined_at": 1101.0,
        "output_tokens": 32,
        "mean_tbt_s": 0.02,
        "max_tbt_s": 0.07,
    }


def test_a_prefix_of_another_store_node_is_shown_as_remote() -> None:
    cluster = Cluster()
    cluster.add_store("left")
    cluster.add_store("right", held=keys(640))
    cluster.add_worker("p0", "prefill", "left")
    cluster.add_worker("d0", "decode", "left")
    cluster.dispatch("r", 650)
    shown = document(receipt_of(cluster, "r"))["attempts"][0]["plan"]["prefill"]
    assert shown["source"] == "right"
    assert shown["prefix_tokens"] == {"dram": 0, "ssd": 0, "remote": 640}


def test_the_choice_is_explained_beside_the_others() -> None:
    cluster = Cluster()
    cluster.add_store()
    for worker_id in ("p0", "p1"):
        cluster.add_worker(worker_id, "prefill")
    cluster.add_worker("d0", "decode")
    cluster.dispatch("r", 640)
    (attempt,) = cluster.conductor.receipts.find("r")[0].attempts
    assert attempt.plan is not None
    plan = document(receipt_of(cluster, "r"))["attempts"][0]["plan"]
    assert [each["worker"] for each in (plan["prefill"], *plan["prefill_candidates"])] == ["p0", "p1"]
    assert plan["why"] == "the earliest first token of those considered"
    slower = attempt.plan.prefill._replace(queue_s=0.25)
    attempt.plan = replace(attempt.plan, prefill=slower)
    plan = document(receipt_of(cluster, "r"))["attempts"][0]["plan"]
    assert plan["why"] == "a first token 0.2500 s later than on p1, the earliest of those considered"
    attempt.plan = replace(attempt.plan, why="the moon is full")
    assert document(receipt_of(cluster, "r"))["attempts"][0]["plan"]["why"] == "the moon is full"


def test_failure_and_another_attempt_are_one_receipt() -> None:
    cluster = one_of_each(prefill=2)
    first = cluster.dispatch("r")
    cluster.fail("r", first.prefill.id)
    assert ended(cluster) == []
    second = cluster.dispatch("r", attempt=1)
    cluster.prefill_done("r", attempt=1)
    cluster.finish("r", attempt=1)
    assert ended(cluster) == [("r", "finished")]
    shown = document(receipt_of(cluster, "r"))
    failed, finished = shown["attempts"]
    assert (failed["outcome"], finished["outcome"]) == ("failed", "finished")
    assert failed["failure"] == {"worker": first.prefill.id, "code": "internal"}
    assert finished["failure"] is None
    assert (failed["actual"], finished["actual"]["output_tokens"]) == (None, 32)
    assert finished["plan"]["prefill"]["worker"] == second.prefill.id != first.prefill.id


def test_a_rejection_has_its_reason_and_when_to_come_again() -> None:
    cluster = Cluster()
    assert cluster.reject("r").retry_after_s == 5.0
    shown = document(receipt_of(cluster, "r"))
    (attempt,) = shown["attempts"]
    assert (shown["outcome"], attempt["plan"], attempt["dispatched"]) == ("rejected", None, False)
    assert attempt["rejection"] == {
        "when": "arrival",
        "reason": "unavailable",
        "message": "no prefill and no decode worker is available",
        "retry_after_s": 5.0,
    }
    assert ended(cluster) == [("r", "rejected")]


def test_a_rejection_by_policy_shows_the_plan_that_was_refused() -> None:
    cluster = Cluster()
    cluster.add_store()
    cluster.add_worker("p0", "prefill")
    cluster.add_worker("d0", "decode", max_sequences=1)
    cluster.dispatch("r")
    rejected = cluster.reject("s")
    (attempt,) = document(receipt_of(cluster, "s"))["attempts"]
    assert attempt["plan"]["predicted_ttft_s"] == rejected.predicted_ttft_s
    assert attempt["rejection"]["reason"] == "overload"
    assert attempt["rejection"]["retry_after_s"] == rejected.retry_after_s > 0


def test_each_choice_has_a_receipt_of_its_own() -> None:
    cluster = one_of_each()
    for choice in (1, 0):
        cluster.hear(RequestArrived(SERVER, Ref("r", choice), keys(64), 64, 8))
    assert [receipt.choice for receipt in cluster.conductor.receipts.find("r")] == [0, 1]
    assert cluster.conductor.receipts.find("s") == []


def test_what_was_cancelled_is_over() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.hear(Cancelled(SERVER, Ref("r")))
    assert ended(cluster) == [("r", "cancelled")]


def test_a_failure_that_nothing_follows_is_the_end_after_a_while() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.fail("r", "d0")
    cluster.now += PATIENCE_S
    cluster.hear(Tick())
    assert ended(cluster) == []
    cluster.now += 1
    cluster.hear(Tick())
    assert ended(cluster) == [("r", "failed")]


def test_another_attempt_ends_the_wait() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.fail("r", "p0")
    cluster.dispatch("r", attempt=1)
    cluster.now += 2 * PATIENCE_S
    cluster.hear(Tick())
    assert ended(cluster) == []
    assert receipt_of(cluster, "r").outcome is Outcome.RUNNING


def test_an_admitted_request_that_waits_for_room_is_not_over() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.fail("r", "d0")
    cluster.hear(ServerLost(ServerId("somebody else")))
    cluster.report("d0", "decode", draining=True)
    only(cluster.arrive("r", attempt=1), Reject)
    assert ended(cluster) == []
    cluster.report("d0", "decode")
    cluster.dispatch("r", attempt=2)
    cluster.finish("r", attempt=2)
    assert ended(cluster) == [("r", "finished")]
    assert [attempt.outcome for attempt in receipt_of(cluster, "r").attempts] == ["failed", "rejected", "finished"]


def test_requests_of_a_lost_server_may_be_heard_of_again() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.dispatch("s")
    cluster.hear(ServerLost(SERVER))
    again = ServerId("server-2")
    cluster.hear(Finished(again, Ref("r"), 5))
    assert ended(cluster) == [("r", "finished")]
    cluster.now += PATIENCE_S + 1
    cluster.hear(Tick())
    assert ended(cluster) == [("s", "lost")]
    cluster.hear(Finished(again, Ref("s"), 5))
    assert ended(cluster) == []
    assert receipt_of(cluster, "s").outcome is Outcome.FINISHED


def test_an_attempt_whose_place_another_takes_does_not_run_for_ever() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.dispatch("r", server=ServerId("again"))  # before the first stream is known to be broken
    cluster.hear(ServerLost(SERVER))
    cluster.hear(Finished(ServerId("again"), Ref("r"), 32))
    assert [attempt.outcome for attempt in receipt_of(cluster, "r").attempts] == [Outcome.LOST, Outcome.FINISHED]


def test_a_prefix_on_ssd_is_no_longer_than_the_prefix() -> None:
    cluster = Cluster()
    on_ssd = tuple(BlockEvent(True, key, Tier.SSD) for key in keys(64))
    cluster.hear(BlockEvents(STORE, "1", 0, on_ssd, snapshot=True))
    cluster.add_worker("m0", "mixed")
    cluster.dispatch("r", num_tokens=64)  # the last token of which is computed in any case
    plan = document(receipt_of(cluster, "r"))["attempts"][0]["plan"]  # type: ignore[index]
    assert plan["prefill"]["prefix_tokens"] == {"dram": 0, "ssd": 63, "remote": 0}


def test_what_is_said_late_about_an_older_attempt_ends_nothing() -> None:
    cluster = one_of_each(decode=2)
    cluster.dispatch("r")
    cluster.dispatch("r", attempt=1)
    cluster.hear(Cancelled(SERVER, Ref("r")))
    assert receipt_of(cluster, "r").outcome is Outcome.RUNNING
    assert [attempt.outcome for attempt in receipt_of(cluster, "r").attempts] == ["cancelled", "running"]
    assert ended(cluster) == []


def test_the_oldest_are_forgotten_but_not_what_runs() -> None:
    cluster = small(limit=2)
    cluster.dispatch("running")
    for request_id in "abc":
        cluster.dispatch(request_id)
        cluster.finish(request_id)
    receipts = cluster.conductor.receipts
    assert [bool(receipts.find(request_id)) for request_id in ("running", "a", "b", "c")] == [True, False, True, True]
    assert len(receipts) == 3
    assert ended(cluster) == [("b", "finished"), ("c", "finished")]


def test_of_many_attempts_the_first_and_the_last_are_kept() -> None:
    cluster = one_of_each()
    for attempt in range(MAX_ATTEMPTS + 5):
        cluster.dispatch("r", attempt=attempt)
        cluster.fail("r", "p0", attempt=attempt)
    receipt = receipt_of(cluster, "r")
    assert receipt.forgotten_attempts == 5
    assert [attempt.number for attempt in receipt.attempts] == [0, *range(6, MAX_ATTEMPTS + 5)]


def test_the_same_id_of_another_tenant_is_another_request() -> None:
    cluster = one_of_each()
    for tenant in ("anna", "bert"):
        cluster.hear(RequestArrived(ServerId(tenant), Ref("r"), keys(64), 64, 8, tenant=tenant))
    assert (receipt_of(cluster, "r").tenant, len(receipt_of(cluster, "r").attempts)) == ("bert", 1)


def test_what_another_conductor_dispatched_has_no_receipt() -> None:
    cluster = one_of_each()
    cluster.hear(PrefillDone(SERVER, Ref("r")))
    assert len(cluster.conductor.receipts) == 0
