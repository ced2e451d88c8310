"""The scheduler itself: events and the time go in, commands come out."""

from collections.abc import Mapping

from perigee.scheduler.admission import Refusal
from perigee.scheduler.commands import Command, Dispatch, Exclude, Proceed, Reject, Resync
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.events import (
    BlockEvents,
    Cancelled,
    Event,
    Failed,
    Finished,
    Joined,
    PrefillDone,
    QuietEvent,
    RequestArrived,
    RequestEvent,
    ServerLost,
    StoreLost,
    Tick,
    WorkerJoined,
    WorkerLost,
)
from perigee.scheduler.ids import RequestKey, WorkerId
from perigee.scheduler.limits import able
from perigee.scheduler.plan import Plan
from perigee.scheduler.policies import Policies, make_policies
from perigee.scheduler.pools import Pools
from perigee.scheduler.receipts import DEFAULT_LIMIT, Receipts
from perigee.scheduler.shadow import Shadow
from perigee.scheduler.view import ClusterView, FailedAttempt, InFlight, Phase
from perigee.scheduler.worker_view import WorkerView
from perigee.workers.messages import WorkerReport


class Conductor:
    """Deterministic: the same events at the same times give the same commands. It reads no clock; `now` is in seconds
    of any clock that does not go back. A `shadow` is asked about each request as well, and changes nothing.
    """

    def __init__(
        self,
        policies: Policies | None = None,
        profile: CostProfile | None = None,
        shadow: Shadow | None = None,
        num_receipts: int = DEFAULT_LIMIT,
        tenant_weights: Mapping[str, float] | None = None,
    ) -> None:
        self._policies = policies or make_policies()
        self.view = ClusterView(profile or CostProfile(), tenant_weights, self._policies.balance.makes_copies)
        self.shadow = shadow
        self.receipts = Receipts(self._policies.names, num_receipts)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Takes in one event and says what is to be done about it."""
        commands = self._handle(event, now)
        self._note_receipt(event, commands, now)
        return commands

    def _handle(self, event: Event, now: float) -> list[Command]:
        match event:
            case RequestArrived():
                return self._arrived(event, now)
            case PrefillDone():
                return self._prefill_done(event, now)
            case WorkerReport():
                return self._reported(event, now)
            case BlockEvents():
                return self._blocks_changed(event)
            case Tick():
                return self._ticked(now)
            case _:
                self._note(event, now)
                return []

    def _note(self, event: QuietEvent, now: float) -> None:
        """Takes in what calls for no command."""
        match event:
            case Joined():
                self._joined(event, now)
            case Finished():
                self._finished(event, now)
            case Failed():
                self._failed(event, now)
            case Cancelled():
                self._cancelled(event, now)
            case ServerLost():
                self.view.drop_server(event.server, now)
            case WorkerJoined():
                self.view.add_worker(event, now)
            case WorkerLost():
                self.view.lose_worker(event.worker_id, event.incarnation, now)
            case StoreLost():
                self.view.lose_store(event.node_id, event.incarnation)

    def _note_receipt(self, event: Event, commands: list[Command], now: float) -> None:
        """Writes down what came of earlier decisions. An arrival's own is written where it is made."""
        match event:
            case PrefillDone() | Joined() | Finished() | Failed() | Cancelled():
                self.receipts.heard(event, commands, now)
            case ServerLost():
                self.receipts.server_lost(event.server, now)
            case Tick():
                self.receipts.pass_time(now)

    # ---- requests

    def _arrived(self, event: RequestArrived, now: float) -> list[Command]:
        key = RequestKey.of(event.server, event.ref)
        if self._is_outdated(key, event):
            return []
        self.view.drop(key, now)
        failed = self.view.failed.pop(key, None)
        pools = able(self.view, event, now)
        if isinstance(pools, Refusal):
            rejected = _reject(event, pools)
            self.receipts.decided(event, rejected, None, None, now)
            return [rejected]
        if not self.view.forecast.num_prefilling:
            self.view.ranks.idle(now)
        pools = _avoiding(pools, failed).preferring_room(self.view.demand(event))
        plan, refusal = self._policies.plan(self.view, pools, event, now)
        shadow = self.shadow.judge(self.view, pools, event, plan, refusal, now) if self.shadow else None
        if refusal:
            self.view.shares.refused(event.tenant, now)
        answer = _reject(event, refusal, plan.ttft_s, plan.tbt_s) if refusal else self._dispatch(key, event, plan, now)
        self.receipts.decided(event, answer, plan, shadow, now)
        return [answer]

    def _dispatch(self, key: RequestKey, event: RequestArrived, plan: Plan, now: float) -> Dispatch:
        self.view.place(key, event, plan, now)
        return Dispatch(
            server=event.server,
            ref=event.ref,
            prefill=plan.prefill.worker.where,
            decode=plan.decode.worker.where,
            prefill_source=plan.prefill.source,
            decode_source=plan.decode_source,
            predicted_ttft_s=plan.ttft_s,
            predicted_tbt_s=plan.tbt_s,
            rank=self.view.requests[key].rank,
        )

    def _prefill_done(self, event: PrefillDone, now: float) -> list[Command]:
        key = RequestKey.of(event.server, event.ref)
        if self._is_outdated(key, event):
            return []
        known = self._known(key, event)
        if known is not None and known.phase is Phase.PREFILL:
            self._learn_prefill(known, event, now)
            self.view.end_prefill(key, now)
            refusal = self._policies.admission.proceed(self.view, known, now)
            if self.shadow:
                self.shadow.judge_again(self.view, known, refusal, now)
            if refusal:
                self.view.drop(key, now)
                return [_reject(event, refusal, known.predicted_ttft_s, known.predicted_tbt_s)]
        # What is not known was dispatched by a Conductor before this one, or lost a worker: its server will find out.
        return [Proceed(event.server, event.ref)]

    def _learn_prefill(self, request: InFlight, event: PrefillDone, now: float) -> None:
        cached_tokens = min(event.cached_tokens, request.num_tokens - 1)
        self.view.costs.observe_prefill(
            self.view.workers[request.prefill].cost,
            now,
            new_tokens=request.num_tokens - cached_tokens,
            prefix_tokens=cached_tokens,
            load_s=0.0 if request.pulls else event.load_s,  # which says nothing about loading alone
            compute_s=event.compute_s,
        )
        self.view.costs.handling.observe(now - request.placed_at - event.queue_s - event.load_s - event.compute_s)
        self.view.ttft_error.observe(request.predicted_ttft_s, event.ttft_s)

    def _joined(self, event: Joined, now: float) -> None:
        key = RequestKey.of(event.server, event.ref)
        if self._known(key, event) is not None:
            self.view.start_decode(key, now)

    def _finished(self, event: Finished, now: float) -> None:
        key = RequestKey.of(event.server, event.ref)
        if known := self._known(key, event):
            self.view.tbt_error.observe(known.predicted_tbt_s, event.mean_tbt_s)
            self.view.count_output(known, event.output_tokens, event.mean_tbt_s)
            self.view.drop(key, now)

    def _failed(self, event: Failed, now: float) -> None:
        key = RequestKey.of(event.server, event.ref)
        if self._is_outdated(key, event):
            return
        self.view.drop(key, now)
        self.view.failed[key] = FailedAttempt(event.worker_id, now)

    def _cancelled(self, event: Cancelled, now: float) -> None:
        key = RequestKey.of(event.server, event.ref)
        if self._is_outdated(key, event):
            return
        self.view.drop(key, now)
        self.view.failed.pop(key, None)

    def _known(self, key: RequestKey, event: RequestEvent) -> InFlight | None:
        """The attempt in flight that an event is about, whose request has this key."""
        known = self.view.requests.get(key)
        return known if known is not None and known.ref == event.ref else None

    def _is_outdated(self, key: RequestKey, event: RequestEvent) -> bool:
        """Whether a newer attempt than the event's is in flight."""
        known = self.view.requests.get(key)
        return known is not None and known.ref.attempt > event.ref.attempt

    # ---- workers and store nodes

    def _reported(self, report: WorkerReport, now: float) -> list[Command]:
        worker = self.view.workers.get(WorkerId(report.worker_id))
        if worker is None or worker.incarnation != report.incarnation:
            return []
        was_excluded = worker.excluded
        self._learn_step(worker, report)
        self.view.update_worker(worker, report, now)
        if worker.excluded and not was_excluded:
            return [Exclude(worker.id, worker.incarnation, "its model card differs from the cluster's")]
        return []

    def _learn_step(self, worker: WorkerView, report: WorkerReport) -> None:
        """A worker that only prefills says nothing about decode steps, nor does one that made none since."""
        steps_before = worker.report.steps_total if worker.report else 0
        if report.role != "prefill" and report.running_sequences and report.steps_total > steps_before:
            self.view.costs.observe_step(
                worker.cost,
                batch=report.running_sequences,
                context_tokens=report.context_tokens,
                step_s=report.last_step_s,
            )

    def _blocks_changed(self, event: BlockEvents) -> list[Command]:
        if self.view.update_store(event):
            return []
        store = self.view.stores.get(event.node_id)
        if store is not None and store.resyncing:
            return []
        if store is not None:
            store.resyncing = True
        return [Resync(event.node_id)]

    def _ticked(self, now: float) -> list[Command]:
        self.view.pass_time(now)
        moves = self._policies.balance.tick(self.view, now)
        for move in moves:
            self.view.move(move, now)
        return list(moves)


def _reject(event: RequestEvent, refusal: Refusal, ttft_s: float = 0.0, tbt_s: float = 0.0) -> Reject:
    """Says also what to expect of the workers that are too busy for it."""
    return Reject(event.server, event.ref, refusal.reason, refusal.message, refusal.retry_after_s, ttft_s, tbt_s)


def _avoiding(pools: Pools, failed: FailedAttempt | None) -> Pools:
    """Without the worker that just failed the request, if others can serve it."""
    if failed is None:
        return pools
    others = pools.without({failed.worker_id})
    return others if others.can_serve else pools
