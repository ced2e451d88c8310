"""Other policies are asked about the same requests, and change nothing."""

from dataclasses import replace

from hypothesis import given, settings

from perigee.scheduler.admission import Refusal
from perigee.scheduler.commands import Dispatch, RejectReason
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.events import RequestArrived
from perigee.scheduler.plan import DecodeEstimate, Plan
from perigee.scheduler.policies import Policies, make_policies
from perigee.scheduler.pools import Pools
from perigee.scheduler.receipt_json import document
from perigee.scheduler.shadow import Shadow, Tally
from perigee.scheduler.view import ClusterView, InFlight
from tests.scheduler.cluster import PROFILE, Cluster
from tests.scheduler.test_storm import Recorded, play, storms


class LastWorkers:
    """Places on the workers of the highest ids, and expects a second for the first token."""

    def __init__(self) -> None:
        self.acting = make_policies().placement

    def place(self, view: ClusterView, pools: Pools, request: RequestArrived, now: float) -> Plan:
        prefill = max(pools.prefill, key=lambda worker: worker.id)
        decode = max(pools.decode, key=lambda worker: worker.id)
        plan = self.acting.place(view, pools, request, now)
        prefill_there = plan.prefill._replace(worker=prefill)
        return replace(plan, prefill=prefill_there, decode=DecodeEstimate(decode, 1.0), ttft_s=1.0)


class Strict:
    """Refuses what is longer than its bound, at once or when the prompt is computed."""

    def __init__(self, at_arrival: int, at_prefill_end: int) -> None:
        self.at_arrival = at_arrival
        self.at_prefill_end = at_prefill_end

    def admit(self, view: ClusterView, request: RequestArrived, plan: Plan, now: float) -> Refusal | None:
        return self._refusal(request.num_tokens > self.at_arrival)

    def proceed(self, view: ClusterView, request: InFlight, now: float) -> Refusal | None:
        return self._refusal(request.num_tokens > self.at_prefill_end)

    def _refusal(self, is_too_long: bool) -> Refusal | None:
        return Refusal(RejectReason.OVERLOAD, "too long", 7.0) if is_too_long else None


def watched(acting: Policies, shadow: Policies) -> tuple[Cluster, Tally]:
    cluster = Cluster()
    watcher = Shadow(shadow)
    cluster.conductor = Conductor(acting, PROFILE, watcher)
    cluster.add_store()
    for worker_id in ("p0", "p1"):
        cluster.add_worker(worker_id, "prefill")
    cluster.add_worker("d0", "decode")
    return cluster, watcher.tally


def strict(at_arrival: int, at_prefill_end: int = 1000) -> Policies:
    return replace(make_policies(), admission=Strict(at_arrival, at_prefill_end))


def test_a_shadow_of_the_same_policies_agrees() -> None:
    cluster, tally = watched(make_policies(), make_policies())
    for index in range(4):
        cluster.dispatch(f"r{index}")
    assert (tally.arrivals, tally.same_workers, tally.agreement, tally.mean_ttft_difference_s) == (4, 4, 1.0, 0.0)


def test_other_placements_are_counted_with_what_they_would_change() -> None:
    cluster, tally = watched(make_policies(), replace(make_policies(), placement=LastWorkers()))
    ours = [cluster.dispatch(f"r{index}", 500) for index in range(2)]
    assert {dispatch.prefill.id for dispatch in ours} == {"p0", "p1"}
    assert (tally.both_dispatched, tally.same_prefill, tally.same_decode, tally.same_workers) == (2, 1, 2, 1)
    assert tally.agreement == 0.5
    assert tally.ttft_difference_s == sum(1.0 - dispatch.predicted_ttft_s for dispatch in ours)
    verdict = document(cluster.conductor.receipts.find("r0")[0])["attempts"][0]["shadow"]
    assert (verdict["rejection"], verdict["plan"]["prefill"]["worker"]) == (None, "p1")


def test_rejections_that_it_would_make_or_avoid_are_counted() -> None:
    cluster, tally = watched(strict(at_arrival=200), strict(at_arrival=100))
    cluster.dispatch("both serve", 50)
    cluster.dispatch("it rejects", 150)
    cluster.reject("both reject", 250)
    assert (tally.both_dispatched, tally.rejections_made, tally.both_rejected, tally.rejections_avoided) == (1, 1, 1, 0)
    verdict = document(cluster.conductor.receipts.find("it rejects")[0])["attempts"][0]["shadow"]
    assert verdict["rejection"] == {"reason": "overload", "message": "too long", "retry_after_s": 7.0}
    cluster, tally = watched(strict(at_arrival=100), strict(at_arrival=200))
    cluster.reject("it serves", 150)
    assert (tally.rejections_made, tally.rejections_avoided) == (0, 1)


def test_second_checks_are_counted_too() -> None:
    cluster, tally = watched(strict(1000, at_prefill_end=100), strict(1000, at_prefill_end=200))
    for request_id, num_tokens in (("both go on", 50), ("it goes on", 150), ("neither", 250)):
        cluster.dispatch(request_id, num_tokens)
        cluster.prefill_done(request_id)
    assert (tally.second_checks, tally.second_rejections_made, tally.second_rejections_avoided) == (3, 0, 1)


def test_what_no_policy_could_help_is_not_asked_about() -> None:
    cluster, tally = watched(make_policies(), make_policies())
    cluster.reject("r", 100_000)
    assert tally == Tally()


@settings(max_examples=50, deadline=None)
@given(storms())
def test_a_shadow_changes_no_command(storm: list[Recorded]) -> None:
    alone = play(Conductor(), storm)
    shadow = Shadow(strict(at_arrival=100))
    assert play(Conductor(shadow=shadow), storm) == alone
    answered = sum(isinstance(command, Dispatch) for commands in alone for command in commands)
    assert shadow.tally.both_dispatched + shadow.tally.rejections_made == answered
