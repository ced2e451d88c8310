"""The cluster as the Conductor knows it. Only the Conductor changes it; policies read it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from perigee.scheduler.commands import Drain, Replicate, SetRole, Trim, WorkerAddress
from perigee.scheduler.copy_log import CopyLog
from perigee.scheduler.cost import CostModel, CostProfile
from perigee.scheduler.cost.accuracy import Accuracy
from perigee.scheduler.events import BlockEvents, RequestArrived, WorkerJoined
from perigee.scheduler.fairness import Ranks, Shares
from perigee.scheduler.fleet import Fleet
from perigee.scheduler.forecast import Forecast
from perigee.scheduler.hot_prefixes import HotPrefixes
from perigee.scheduler.ids import NodeId, RequestKey, ServerId, WorkerId
from perigee.scheduler.lengths import LengthModel
from perigee.scheduler.move_counts import MoveCounts
from perigee.scheduler.outlook import Coming
from perigee.scheduler.plan import Plan, PrefillEstimate
from perigee.scheduler.pools import Pools
from perigee.scheduler.prefixes import PrefixIndex
from perigee.scheduler.prompt_queue import PlacedPrefill, PromptQueue
from perigee.scheduler.roster import Roster
from perigee.scheduler.slo import NO_SLO, Slo
from perigee.scheduler.store_view import StoreView
from perigee.scheduler.transfers import Transfers
from perigee.scheduler.worker_view import NO_DEMAND, DecodeLoad, Demand, WorkerView
from perigee.workers.engine.sequence import Ref
from perigee.workers.messages import ModelCard, WorkerReport

# Who failed an attempt is remembered for this long, in case the server submits the next one.
FAILURE_MEMORY_S = 30.0

# Weight of one finished request in the mean time that decoding takes.
_DECODE_WEIGHT = 0.05


class Phase(Enum):
    """Where a request is, as its server tells."""

    PREFILL = auto()
    HANDOVER = auto()  # the first token is there, the decode worker has not joined
    DECODE = auto()


@dataclass(slots=True)
class InFlight:
    """A dispatched attempt. The Conductor moves its phase."""

    ref: Ref
    prefill: WorkerId
    decode: WorkerId
    num_tokens: int
    predicted_ttft_s: float
    predicted_tbt_s: float
    pulls: bool = False  # a part of its prefix, from another store node
    max_tokens: int = 0
    tenant: str = ""
    priority: int = 0
    slo: Slo = NO_SLO
    demand: Demand = NO_DEMAND
    work_s: float = 0.0  # to compute its prompt, as predicted
    rank: float = 0.0
    placed_at: float = 0.0
    phase: Phase = Phase.PREFILL


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """Who failed the last attempt at a request, and when."""

    worker_id: WorkerId
    at: float


class ClusterView:
    """Workers, store nodes, prefix locations and requests in flight.

    With `notes_copies` also what policies that make copies ask for: hot prefixes, and the copies that there are.
    """

    def __init__(
        self, profile: CostProfile, tenant_weights: Mapping[str, float] | None = None, notes_copies: bool = True
    ) -> None:
        self.profile = profile
        self.costs = CostModel(profile)
        self.workers: dict[WorkerId, WorkerView] = {}
        self.stores: dict[NodeId, StoreView] = {}
        self.prefixes = PrefixIndex()
        self.fleet = Fleet(profile)
        self.transfers = Transfers()
        self.move_counts = MoveCounts()
        self._notes_copies = notes_copies
        self.hot_prefixes = HotPrefixes(self.prefixes, profile)
        self.copy_log = CopyLog()
        self._roster = Roster(self.fleet, self.workers, self.stores, self.prefixes)
        self.requests: dict[RequestKey, InFlight] = {}
        self.failed: dict[RequestKey, FailedAttempt] = {}
        self.card: ModelCard | None = None
        self.ttft_error = Accuracy()
        self.tbt_error = Accuracy()
        self.lengths = LengthModel()
        self.forecast = Forecast(self.lengths)
        self.ranks = Ranks(tenant_weights)
        self.shares = Shares(tenant_weights)
        self.mean_decode_s = math.inf  # until an answer has ended
        self._num_decoded = 0
        self._demand: tuple[RequestArrived, ModelCard, Demand] | None = None  # of the last request
        self.ordered_prefill_s = 0.0  # what all prompts placed so far take, as predicted
        self._num_dispatched = 0

    # ---- what policies ask

    def pools(self, now: float) -> Pools:
        """The workers that may be given work."""
        return self._roster.pools(now)

    def ready(self, now: float) -> bool:
        """Whether each phase has a worker whose store node is known."""
        return self.pools(now).can_serve

    def demand(self, request: RequestArrived) -> Demand:
        """What a request takes, in pages of the model's blocks. Needs a card, hence a worker."""
        assert self.card is not None
        if self._demand is None or self._demand[0] is not request or self._demand[1] is not self.card:
            max_len = min(request.num_tokens + request.max_tokens, self.card.max_context)
            self._demand = request, self.card, Demand.of(request.num_tokens, max_len, self.card.block_tokens)
        return self._demand[2]

    # ---- requests

    def place(self, key: RequestKey, request: RequestArrived, plan: Plan, now: float) -> None:
        """Books a dispatched request on its two workers."""
        demand = self.demand(request)
        self._num_dispatched += 1
        prefill, decode = plan.prefill.worker, plan.decode.worker
        prefill.last_chosen = decode.last_chosen = self._num_dispatched
        rank = self.ranks.rank(request, plan.prefill.compute_s, len(self.workers))
        self._queue_prompt(key, plan.prefill, rank, now)
        decode.add_decode(key, DecodeLoad(1, demand.pages, demand.num_tokens))
        self.fleet.refresh_queue(prefill)
        self.fleet.refresh_load(decode)
        self.requests[key] = InFlight(
            ref=request.ref,
            prefill=prefill.id,
            decode=decode.id,
            num_tokens=request.num_tokens,
            predicted_ttft_s=plan.ttft_s,
            predicted_tbt_s=plan.tbt_s,
            pulls=bool(plan.prefill.source),
            max_tokens=request.max_tokens,
            tenant=request.tenant,
            priority=request.priority,
            slo=request.slo,
            demand=demand,
            work_s=plan.prefill.compute_s,
            rank=rank,
            placed_at=now,
        )
        self.ordered_prefill_s += plan.prefill.load_s + plan.prefill.compute_s
        if self._notes_copies:
            self._note_copies(request, plan, now)
        self.shares.take(request.tenant, demand.pages)
        self.forecast.place(key, decode, self._coming(request, demand, plan, now), now)

    def _queue_prompt(self, key: RequestKey, prefill: PrefillEstimate, rank: float, now: float) -> None:
        """Books the prompt on its worker, and what it pulls on the store nodes."""
        prompt = PlacedPrefill(prefill.new_tokens, prefill.prefix_tokens, prefill.work_s, rank, now)
        prefill.worker.queue.add(key, prompt, now)
        numbers = self.prefixes.numbers
        if prefill.source:
            source, target = numbers[NodeId(prefill.source)], numbers[prefill.worker.store]
            self.transfers.book(source, target, prefill.way.transfer_s, now)

    def _note_copies(self, request: RequestArrived, plan: Plan, now: float) -> None:
        """What the request misses on its node, and the copies that it leaves behind."""
        assert self.card is not None
        keys, prefill, block_tokens = request.block_keys, plan.prefill, self.card.block_tokens
        self.hot_prefixes.note(request, prefill, block_tokens, now)
        self.copy_log.use(keys, now)
        if prefill.source:
            here = (prefill.prefix_tokens - prefill.remote_tokens) // block_tokens
            fetched = keys[here : -(-prefill.prefix_tokens // block_tokens)]
            self.copy_log.add(prefill.worker.store, fetched, now)
        if plan.decode_source:
            self.copy_log.add(plan.decode.worker.store, keys, now)

    def _coming(self, request: RequestArrived, demand: Demand, plan: Plan, now: float) -> Coming:
        """What its decode worker has to expect."""
        return Coming(
            starts_at=now + plan.ttft_s - request.age_s,
            odds=self.lengths.odds(request.num_tokens, request.max_tokens, request.tenant),
            context_tokens=request.num_tokens,
            pages=demand.pages,
            tbt_s=request.slo.tbt_s,
            work_s=plan.prefill.compute_s,
        )

    def end_prefill(self, key: RequestKey, now: float) -> None:
        """The prefill worker has nothing to compute for this request any more."""
        request = self.requests[key]
        request.phase = Phase.HANDOVER
        prefill = self.workers[request.prefill]
        prefill.queue.remove(key, now)
        self.fleet.refresh(prefill)
        self.forecast.prefilled(key, request.decode, now)
        self.ranks.served(request.rank, request.priority)

    def start_decode(self, key: RequestKey, now: float) -> None:
        """The decode worker has it in its batch."""
        request = self.requests[key]
        request.phase = Phase.DECODE
        self.forecast.joined(key, request.decode, now)

    def drop(self, key: RequestKey, now: float) -> None:
        """Takes a request off the books, if it is on them."""
        request = self.requests.pop(key, None)
        if request is None:
            return
        if prefill := self.workers.get(request.prefill):
            prefill.queue.remove(key, now)
            self.fleet.refresh_queue(prefill)
        if decode := self.workers.get(request.decode):
            decode.remove_decode(key, now)
            self.fleet.refresh_load(decode)
        self.shares.give_back(request.tenant, request.demand.pages)
        self.forecast.drop(key, request.decode)

    def drop_server(self, server: ServerId, now: float) -> None:
        """Takes all that a server asked for off the books."""
        for key in [key for key in self.requests if key.server == server]:
            self.drop(key, now)
        for key in [key for key in self.failed if key.server == server]:
            del self.failed[key]

    def pass_time(self, now: float) -> None:
        """Drops the memory of failures that no new attempt has followed, and of how workers were that did nothing."""
        self.costs.relax((worker.cost for worker in self.workers.values()), now)
        for worker in self.workers.values():
            self.fleet.refresh(worker)
        for key in [key for key, failed in self.failed.items() if now - failed.at > FAILURE_MEMORY_S]:
            del self.failed[key]

    def count_output(self, request: InFlight, output_tokens: int, mean_tbt_s: float) -> None:
        """Learns from a finished answer. One that was taken up after a failure says nothing of its whole length."""
        if request.ref.attempt == 0 and output_tokens > 0:
            self.lengths.observe(request.num_tokens, request.max_tokens, request.tenant, output_tokens)
            self._num_decoded += 1
            decode_s = (output_tokens - 1) * mean_tbt_s
            before_s = self.mean_decode_s if self._num_decoded > 1 else decode_s
            self.mean_decode_s = before_s + max(_DECODE_WEIGHT, 1 / self._num_decoded) * (decode_s - before_s)

    # ---- workers

    def add_worker(self, joined: WorkerJoined, now: float) -> None:
        """Enters a new incarnation of a worker; the one before is lost."""
        if before := self.workers.get(joined.worker_id):
            self.lose_worker(before.id, before.incarnation, now)
        cost, row = self.costs.new_worker(), self.fleet.take_row()
        queue = PromptQueue(self.fleet.work, row)
        where = WorkerAddress(joined.worker_id, joined.address, joined.incarnation)
        worker = WorkerView(joined.worker_id, joined.incarnation, where, joined.store, cost, row, queue)
        self.workers[worker.id] = worker
        self.fleet.enter(worker)

    def lose_worker(self, worker_id: WorkerId, incarnation: str, now: float) -> None:
        """Drops a worker, and the requests that needed it still. Does nothing if it is another incarnation by now."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.incarnation != incarnation:
            return
        for key in [*worker.prefills, *worker.decodes]:
            self.drop(key, now)
        del self.workers[worker_id]
        self.fleet.remove(worker)
        self._roster.changed()
        self._elect_card()

    def update_worker(self, worker: WorkerView, report: WorkerReport, now: float) -> None:
        """Takes in what a worker says about itself."""
        self.move_counts.role_changes += worker.report is not None and worker.report.role != report.role
        worker.take_report(report, now)
        self.forecast.reported(worker.id, report.steps_total, now)
        if self.card is None:
            self.card = report.card
        worker.excluded = _identity(report.card) != _identity(self.card)
        if worker.excluded:
            self._elect_card()  # it may have been the last to show the cluster's
        self.fleet.refresh(worker)
        self._roster.heard(worker, now)

    # ---- moves

    def move(self, move: Drain | Replicate | Trim | SetRole, now: float) -> None:
        """Takes in what is about to be moved. What comes of it, workers and store nodes will tell."""
        counts = self.move_counts
        match move:
            case Drain():
                counts.drains += move.draining
                self._drain(move)
            case Replicate():
                counts.replications += 1
                counts.replicated_blocks += len(move.keys)
                self._book_copy(move, now)
            case Trim():
                counts.trims += 1
                counts.trimmed_blocks += len(move.keys)

    def _drain(self, drain: Drain) -> None:
        worker = self.workers.get(drain.worker_id)
        if worker is not None and worker.incarnation == drain.incarnation:
            worker.draining = drain.draining
            self._roster.changed()

    def _book_copy(self, copy: Replicate, now: float) -> None:
        assert self.card is not None
        numbers = self.prefixes.numbers
        seconds = self.profile.transfer_s(float(len(copy.keys) * self.card.block_tokens))
        self.transfers.book(numbers[copy.source], numbers[copy.node_id], seconds, now)

    # ---- store nodes

    def update_store(self, events: BlockEvents) -> bool:
        """Takes in what changed on a store node. False if events are missing before these, which are then unused."""
        store = self.stores.get(events.node_id)
        if events.snapshot:
            self._forget_blocks(events.node_id)
        elif store is None or not store.continues_with(events):
            return False
        self.prefixes.apply(events.node_id, events.events)
        next_seq = events.first_seq + len(events.events)
        self.stores[events.node_id] = StoreView(events.incarnation, next_seq, events.num_slots)
        if events.snapshot or store is None or store.num_slots != events.num_slots:
            self._roster.changed()
        return True

    def lose_store(self, node_id: NodeId, incarnation: str) -> None:
        """Its blocks are nowhere any more. Does nothing if another incarnation has taken its place."""
        store = self.stores.get(node_id)
        if store is not None and store.incarnation == incarnation:
            del self.stores[node_id]
            self._forget_blocks(node_id)
            self._roster.changed()

    def _forget_blocks(self, node_id: NodeId) -> None:
        """Of a node that is lost or tells anew. Its number may then be another's, who has nothing to transfer yet."""
        if (number := self.prefixes.numbers.get(node_id)) is not None:
            self.transfers.forget(number)
            self.prefixes.forget(node_id)

    def _elect_card(self) -> None:
        """The first worker's card is the cluster's for as long as anyone shows it; then the next one's is."""
        if self.card is None or any(_identity(card) == _identity(self.card) for card in self._cards()):
            return
        self.card = next(self._cards(), None)
        for worker in self.workers.values():
            worker.excluded = worker.report is not None and (
                self.card is None or _identity(worker.report.card) != _identity(self.card)
            )
        self._roster.changed()

    def _cards(self) -> Iterator[ModelCard]:
        return (worker.report.card for worker in self.workers.values() if worker.report is not None)


def _identity(card: ModelCard) -> tuple[bytes, str, str, str, str, int]:
    """What two workers must share for one to go on with the other's blocks."""
    return (
        card.namespace,
        card.weights_digest,
        card.config_digest,
        card.tokenizer_digest,
        card.dtype,
        card.block_tokens,
    )
