"""What the Conductor makes of the life of requests, workers and store nodes."""

from dataclasses import replace

import pytest

from perigee.kvstore.messages import BlockEvent
from perigee.scheduler.commands import Exclude, Proceed, RejectReason, Resync
from perigee.scheduler.events import BlockEvents, Cancelled, RequestArrived, ServerLost, StoreLost, Tick, WorkerLost
from perigee.scheduler.ids import RequestKey, ServerId, WorkerId
from perigee.scheduler.view import ClusterView, Phase
from perigee.scheduler.worker_view import DecodeLoad
from perigee.workers.engine.sequence import Ref
from tests.scheduler.cluster import BLOCK_TOKENS, CARD, SERVER, STORE, Cluster, keys, one_of_each, only

OTHER_SERVER = ServerId("server-2")


def is_at_rest(view: ClusterView) -> bool:
    """Whether nothing is on the books."""
    return not view.requests and all(
        not worker.prefills and not worker.decodes and worker.load == worker.foreign for worker in view.workers.values()
    )


# ---- requests


def test_prefill_done_is_answered_with_proceed() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    assert cluster.prefill_done("r") == [Proceed(SERVER, Ref("r"))]


def test_prefill_done_of_what_an_earlier_conductor_dispatched_is_answered_with_proceed() -> None:
    cluster = one_of_each()
    assert cluster.prefill_done("r") == [Proceed(SERVER, Ref("r"))]
    assert is_at_rest(cluster.conductor.view)


def test_prefill_done_of_an_older_attempt_is_nobodys() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.dispatch("r", attempt=1)
    assert cluster.prefill_done("r", attempt=0) == []
    assert cluster.conductor.view.requests[RequestKey(SERVER, "r", 0)].phase is Phase.PREFILL


def test_a_request_goes_through_its_phases_and_leaves_nothing() -> None:
    cluster = one_of_each()
    view = cluster.conductor.view
    cluster.dispatch("r")
    key = RequestKey(SERVER, "r", 0)
    phases = [view.requests[key].phase]
    cluster.prefill_done("r")
    assert not view.workers[WorkerId("p0")].prefills
    phases.append(view.requests[key].phase)
    cluster.joined("r")
    phases.append(view.requests[key].phase)
    assert phases == [Phase.PREFILL, Phase.HANDOVER, Phase.DECODE]
    assert view.workers[WorkerId("d0")].load == DecodeLoad(sequences=1, pages=3, context_tokens=64)
    cluster.finish("r")
    assert is_at_rest(view)


def test_choices_of_one_request_are_separate() -> None:
    cluster = one_of_each()
    for choice in range(3):
        cluster.hear(RequestArrived(SERVER, Ref("r", choice), keys(64), 64, 32))
    assert cluster.conductor.view.workers[WorkerId("d0")].load.sequences == 3
    cluster.finish("r")
    assert cluster.conductor.view.workers[WorkerId("d0")].load.sequences == 2


def test_servers_may_use_the_same_request_id() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.dispatch("r", server=OTHER_SERVER)
    cluster.finish("r")
    assert list(cluster.conductor.view.requests) == [RequestKey(OTHER_SERVER, "r", 0)]


def test_a_newer_attempt_takes_the_place_of_the_older() -> None:
    cluster = one_of_each()
    cluster.dispatch("r", num_tokens=64)
    cluster.dispatch("r", num_tokens=320, attempt=1)
    assert cluster.conductor.view.workers[WorkerId("d0")].load == DecodeLoad(1, 11, 320)
    assert cluster.arrive("r", attempt=0) == []
    cluster.finish("r", attempt=0)
    assert cluster.conductor.view.workers[WorkerId("d0")].load.sequences == 1
    cluster.finish("r", attempt=1)
    assert is_at_rest(cluster.conductor.view)


def test_a_newer_attempt_that_is_rejected_takes_the_older_off_the_books_too() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.report("d0", "decode", draining=True)
    assert cluster.arrive("r", attempt=1) != []
    assert is_at_rest(cluster.conductor.view)


@pytest.mark.parametrize("phase", Phase)
def test_a_cancelled_request_leaves_nothing_whatever_its_phase(phase: Phase) -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    if phase is not Phase.PREFILL:
        cluster.prefill_done("r")
    if phase is Phase.DECODE:
        cluster.joined("r")
    cluster.hear(Cancelled(SERVER, Ref("r")))
    assert is_at_rest(cluster.conductor.view)


def test_a_lost_servers_requests_go_and_the_others_stay() -> None:
    cluster = one_of_each()
    cluster.dispatch("a")
    cluster.dispatch("b", server=OTHER_SERVER)
    cluster.hear(ServerLost(SERVER))
    assert list(cluster.conductor.view.requests) == [RequestKey(OTHER_SERVER, "b", 0)]
    cluster.hear(ServerLost(OTHER_SERVER))
    assert is_at_rest(cluster.conductor.view)


# ---- failures


@pytest.mark.parametrize("failing", ["p0", "d0"])
def test_the_next_attempt_avoids_the_worker_that_failed(failing: str) -> None:
    cluster = one_of_each(prefill=2, decode=2)
    cluster.dispatch("r")
    cluster.fail("r", failing)
    # By load alone the failed one would be as good as the other.
    cluster.report("p1", "prefill", queued_prefill_tokens=1000)
    cluster.report("d1", "decode", running_sequences=1)
    dispatch = cluster.dispatch("r", attempt=1)
    assert failing not in (dispatch.prefill.id, dispatch.decode.id)


def test_only_the_immediate_next_attempt_avoids_it() -> None:
    cluster = one_of_each(decode=2)
    cluster.report("d1", "decode", running_sequences=1)
    cluster.dispatch("r")
    cluster.fail("r", "d0")
    assert cluster.dispatch("r", attempt=1).decode.id == "d1"
    assert cluster.dispatch("other").decode.id == "d0"
    cluster.fail("r", "d1", attempt=1)
    assert cluster.dispatch("r", attempt=2).decode.id == "d0"


def test_the_only_worker_is_tried_again_though_it_failed() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.fail("r", "d0")
    assert is_at_rest(cluster.conductor.view)
    assert cluster.dispatch("r", attempt=1).decode.id == "d0"


def test_a_failure_of_an_older_attempt_does_not_end_the_newer() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.dispatch("r", attempt=1)
    cluster.fail("r", "d0", attempt=0)
    assert cluster.conductor.view.workers[WorkerId("d0")].load.sequences == 1


def test_failures_are_forgotten_if_no_attempt_follows() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.fail("r", "d0")
    cluster.hear(Tick())
    assert cluster.conductor.view.failed
    cluster.now += 60.0
    cluster.hear(Tick())
    assert not cluster.conductor.view.failed


# ---- workers


def test_a_lost_workers_requests_leave_the_books_on_both_sides() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.hear(WorkerLost(WorkerId("d0"), "1"))
    assert is_at_rest(cluster.conductor.view)
    assert cluster.reject("s").reason is RejectReason.UNAVAILABLE


def test_a_request_outlives_its_prefill_worker_once_prefill_is_done() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.prefill_done("r")
    cluster.hear(WorkerLost(WorkerId("p0"), "1"))
    assert cluster.conductor.view.workers[WorkerId("d0")].load.sequences == 1
    cluster.finish("r")
    assert is_at_rest(cluster.conductor.view)


def test_a_new_incarnation_starts_empty_and_the_next_attempt_finds_it() -> None:
    cluster = one_of_each()
    cluster.dispatch("r")
    cluster.prefill_done("r")
    cluster.add_worker("d0", "decode", incarnation="2")
    assert is_at_rest(cluster.conductor.view)
    cluster.fail("r", "d0")
    assert cluster.dispatch("r", attempt=1).decode.incarnation == "2"


def test_what_is_said_of_an_older_incarnation_is_ignored() -> None:
    cluster = one_of_each()
    cluster.add_worker("d0", "decode", incarnation="2")
    cluster.report("d0", "decode", incarnation="1", draining=True)
    cluster.hear(WorkerLost(WorkerId("d0"), "1"))
    cluster.dispatch("r")


def test_a_worker_that_nobody_announced_is_ignored() -> None:
    cluster = one_of_each()
    cluster.report("stranger", "decode")
    assert WorkerId("stranger") not in cluster.conductor.view.workers


@pytest.mark.parametrize(
    "difference",
    [
        {"namespace": bytes(31) + b"x"},
        {"weights_digest": "x"},
        {"config_digest": "x"},
        {"tokenizer_digest": "x"},
        {"dtype": "bfloat16"},
        {"block_tokens": 64},
    ],
    ids=lambda difference: next(iter(difference)),
)
def test_a_worker_with_another_model_card_is_left_out_and_that_is_said_once(difference: dict[str, object]) -> None:
    cluster = one_of_each()
    card = replace(CARD, **difference)  # type: ignore[arg-type]
    (command,) = cluster.add_worker("odd", "mixed", card=card)
    assert isinstance(command, Exclude)
    assert (command.worker_id, command.incarnation) == ("odd", "1")
    assert cluster.report("odd", "mixed", card=card) == []
    assert {cluster.dispatch(f"r{i}", salt=i).prefill.id for i in range(4)} == {"p0"}


def test_once_nobody_shows_the_first_card_the_next_ones_counts() -> None:
    cluster = one_of_each()
    cluster.add_worker("m1", "mixed", card=replace(CARD, weights_digest="next"))
    cluster.hear(WorkerLost(WorkerId("p0"), "1"))
    assert cluster.reject("r").reason is RejectReason.UNAVAILABLE
    cluster.hear(WorkerLost(WorkerId("d0"), "1"))
    assert cluster.dispatch("r", attempt=1).prefill.id == "m1"


def test_a_card_that_its_last_worker_gives_up_is_the_clusters_no_longer() -> None:
    cluster = one_of_each()
    card = replace(CARD, weights_digest="next")
    only(cluster.report("p0", "prefill", card=card), Exclude)
    assert cluster.reject("r").reason is RejectReason.UNAVAILABLE
    assert cluster.report("d0", "decode", card=card) == []
    cluster.dispatch("r", attempt=1)


def test_step_times_are_learned_from_new_steps_of_decoding_workers_only() -> None:
    cluster = one_of_each()
    cluster.report("p0", "prefill", running_sequences=1, last_step_s=5.0, steps_total=1)
    cluster.report("d0", "decode", running_sequences=1, last_step_s=0.11, steps_total=1)
    cluster.report("d0", "decode", running_sequences=1, last_step_s=0.11, steps_total=1)
    costs = cluster.conductor.view.workers[WorkerId("d0")].cost
    assert costs.step.factor == pytest.approx(10.0)


def test_a_decode_worker_that_was_slow_once_gets_work_again_after_a_while() -> None:
    cluster = one_of_each(decode=2)
    for worker in ("d0", "d1"):
        cluster.report(worker, "decode", running_sequences=1, last_step_s=0.011, steps_total=1)
    cluster.report("d0", "decode", running_sequences=1, last_step_s=5.0, steps_total=2)
    cluster.report("d0", "decode", steps_total=2)
    chosen = [cluster.dispatch("first").decode.id]
    cluster.finish("first")
    for second in range(300):
        cluster.now += 1.0
        cluster.hear(Tick())
        for worker, running in (("d0", 0), ("d1", 1)):
            steps = {"running_sequences": running, "last_step_s": 0.011, "steps_total": 2 + second * running}
            cluster.report(worker, "decode", **steps)
            cluster.report(worker, "decode", steps_total=2 + second * running)
        cluster.report("p0", "prefill")
    for request in ("second", "third"):
        chosen.append(cluster.dispatch(request).decode.id)
        cluster.finish(request)
    assert chosen == ["d1", "d0", "d1"]


def test_predictions_are_held_against_what_came() -> None:
    cluster = one_of_each()
    dispatch = cluster.dispatch("r")
    cluster.prefill_done("r", ttft_s=2 * dispatch.predicted_ttft_s)
    cluster.finish("r")
    assert cluster.conductor.view.ttft_error.mean == pytest.approx(0.5)
    assert cluster.conductor.view.tbt_error.observations == 1


def test_cached_tokens_are_not_taken_for_computed_ones() -> None:
    cluster = one_of_each()
    cluster.dispatch("r", num_tokens=1000)
    cluster.prefill_done("r", cached_tokens=900, compute_s=0.2, load_s=0.009)
    assert cluster.conductor.view.workers[WorkerId("p0")].cost.prefill.factor == pytest.approx(2.0)


# ---- store nodes


def changes(first_seq: int, *tokens: int, incarnation: str = "1") -> BlockEvents:
    events = tuple(BlockEvent(True, keys(BLOCK_TOKENS, salt)[0]) for salt in tokens)
    return BlockEvents(STORE, incarnation, first_seq, events)


def cached(cluster: Cluster, salt: int) -> int:
    return cluster.conductor.view.prefixes.match(keys(BLOCK_TOKENS, salt)).get(STORE, 0)


def test_events_in_sequence_are_taken_in() -> None:
    cluster = Cluster()
    cluster.add_store(held=keys(BLOCK_TOKENS, 0))
    assert cluster.hear(changes(1, 1, 2)) == []
    assert cluster.hear(changes(3, 3)) == []
    assert [cached(cluster, salt) for salt in range(5)] == [1, 1, 1, 1, 0]


def test_a_gap_asks_once_for_a_new_snapshot_and_keeps_what_is_known_until_then() -> None:
    cluster = Cluster()
    cluster.add_store(held=keys(BLOCK_TOKENS, 0))
    assert cluster.hear(changes(2, 1)) == [Resync(STORE)]
    assert cluster.hear(changes(3, 2)) == []
    assert [cached(cluster, salt) for salt in range(3)] == [1, 0, 0]
    cluster.add_store(held=keys(BLOCK_TOKENS, 2))
    assert [cached(cluster, salt) for salt in range(3)] == [0, 0, 1]
    assert cluster.hear(changes(1, 1)) == []
    assert cached(cluster, 1) == 1


def test_events_before_any_snapshot_ask_for_one() -> None:
    assert Cluster().hear(changes(0, 1)) == [Resync(STORE)]


def test_events_of_another_incarnation_ask_for_a_snapshot() -> None:
    cluster = Cluster()
    cluster.add_store()
    assert cluster.hear(changes(0, 1, incarnation="2")) == [Resync(STORE)]


def test_a_lost_store_holds_nothing() -> None:
    cluster = Cluster()
    cluster.add_store(held=keys(BLOCK_TOKENS, 0))
    cluster.hear(StoreLost(STORE, "0"))
    assert cached(cluster, 0) == 1
    cluster.hear(StoreLost(STORE, "1"))
    assert cached(cluster, 0) == 0
    assert len(cluster.conductor.view.prefixes) == 0
