"""The cluster as the Conductor knows it. Only the Conductor changes it; policies read it."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from perigee.scheduler.cost import CostModel, CostProfile, Error
from perigee.scheduler.events import BlockEvents, RequestArrived, WorkerJoined
from perigee.scheduler.ids import NodeId, RequestKey, ServerId, WorkerId
from perigee.scheduler.plan import Plan
from perigee.scheduler.pools import Pools
from perigee.scheduler.prefixes import PrefixIndex
from perigee.scheduler.slo import NO_SLO, Slo
from perigee.scheduler.worker_view import NO_DEMAND, DecodeLoad, Demand, PlacedDecode, PlacedPrefill, WorkerView
from perigee.workers.engine.sequence import Ref
from perigee.workers.messages import ModelCard, WorkerReport

# A worker reports four times a second. One that is silent for this long is stopped or cut off, and gets no more work.
STALE_AFTER_S = 5.0

# Who failed an attempt is remembered for this long, in case the server submits the next one.
FAILURE_MEMORY_S = 30.0

# Weight of one finished request in the mean output length.
_LENGTH_WEIGHT = 0.05


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
    placed_at: float = 0.0
    phase: Phase = Phase.PREFILL
    phase_at: float = 0.0  # when it came to its phase


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """Who failed the last attempt at a request, and when."""

    worker_id: WorkerId
    at: float


@dataclass(slots=True)
class StoreView:
    """A store node whose blocks are known up to `next_seq`. While `resyncing`, its events are of no use.

    It can hold `num_slots` blocks, 0 while that is not known.
    """

    incarnation: str
    next_seq: int
    num_slots: int
    resyncing: bool = False


class ClusterView:
    """Workers, store nodes, prefix locations and requests in flight."""

    def __init__(self, profile: CostProfile) -> None:
        self.costs = CostModel(profile)
        self.workers: dict[WorkerId, WorkerView] = {}
        self.stores: dict[NodeId, StoreView] = {}
        self.prefixes = PrefixIndex()
        self.requests: dict[RequestKey, InFlight] = {}
        self.failed: dict[RequestKey, FailedAttempt] = {}
        self.card: ModelCard | None = None
        self.ttft_error = Error()
        self.tbt_error = Error()
        self.mean_output_tokens: float | None = None
        self._num_dispatched = 0

    # ---- what policies ask

    def pools(self, now: float) -> Pools:
        """The workers that may be given work."""
        return Pools.of(worker for worker in self.workers.values() if self._usable(worker, now))

    def ready(self, now: float) -> bool:
        """Whether each phase has a worker whose store node is known."""
        return self.pools(now).can_serve

    def demand(self, request: RequestArrived) -> Demand:
        """What a request takes, in pages of the model's blocks. Needs a card, hence a worker."""
        assert self.card is not None
        max_len = min(request.num_tokens + request.max_tokens, self.card.max_context)
        return Demand.of(request.num_tokens, max_len, self.card.block_tokens)

    def stores_for(self, num_blocks: int) -> frozenset[NodeId]:
        """The store nodes that could hold this many blocks, those included of which that is not known yet."""
        return frozenset(
            node for node, store in self.stores.items() if not store.num_slots or num_blocks <= store.num_slots
        )

    def expected_output_tokens(self, max_tokens: int) -> float:
        """How long an answer will be, from the answers so far."""
        return max_tokens if self.mean_output_tokens is None else min(max_tokens, self.mean_output_tokens)

    # ---- requests

    def place(self, key: RequestKey, request: RequestArrived, plan: Plan, now: float) -> None:
        """Books a dispatched request on its two workers."""
        demand = self.demand(request)
        self._num_dispatched += 1
        prefill, decode = plan.prefill.worker, plan.decode.worker
        prefill.last_chosen = decode.last_chosen = self._num_dispatched
        prefill.prefills[key] = PlacedPrefill(plan.prefill.new_tokens, now)
        remaining_s = plan.ttft_s - request.age_s + plan.tbt_s * self.expected_output_tokens(request.max_tokens)
        decode.decodes[key] = PlacedDecode(DecodeLoad(1, demand.pages, demand.num_tokens), now + remaining_s)
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
            placed_at=now,
            phase_at=now,
        )

    def end_prefill(self, key: RequestKey, now: float) -> None:
        """The prefill worker has nothing to compute for this request any more."""
        request = self.requests[key]
        request.phase, request.phase_at = Phase.HANDOVER, now
        self.workers[request.prefill].prefills.pop(key, None)

    def drop(self, key: RequestKey) -> None:
        """Takes a request off the books, if it is on them."""
        request = self.requests.pop(key, None)
        if request is None:
            return
        if prefill := self.workers.get(request.prefill):
            prefill.prefills.pop(key, None)
        if decode := self.workers.get(request.decode):
            decode.decodes.pop(key, None)

    def drop_server(self, server: ServerId) -> None:
        """Takes all that a server asked for off the books."""
        for key in [key for key in self.requests if key.server == server]:
            self.drop(key)
        for key in [key for key in self.failed if key.server == server]:
            del self.failed[key]

    def pass_time(self, now: float) -> None:
        """Drops the memory of failures that no new attempt has followed, and of how workers were that did nothing."""
        self.costs.relax((worker.cost for worker in self.workers.values()), now)
        for key in [key for key, failed in self.failed.items() if now - failed.at > FAILURE_MEMORY_S]:
            del self.failed[key]

    def count_output(self, output_tokens: int) -> None:
        """Learns from the length of a finished answer."""
        mean = self.mean_output_tokens
        self.mean_output_tokens = output_tokens if mean is None else mean + _LENGTH_WEIGHT * (output_tokens - mean)

    # ---- workers

    def add_worker(self, joined: WorkerJoined) -> None:
        """Enters a new incarnation of a worker; the one before is lost."""
        if before := self.workers.get(joined.worker_id):
            self.lose_worker(before.id, before.incarnation)
        cost = self.costs.new_worker()
        self.workers[joined.worker_id] = WorkerView(
            joined.worker_id, joined.incarnation, joined.address, joined.store, cost
        )

    def lose_worker(self, worker_id: WorkerId, incarnation: str) -> None:
        """Drops a worker, and the requests that needed it still. Does nothing if it is another incarnation by now."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.incarnation != incarnation:
            return
        del self.workers[worker_id]
        for key in [*worker.prefills, *worker.decodes]:
            self.drop(key)
        self._elect_card()

    def update_worker(self, worker: WorkerView, report: WorkerReport, now: float) -> None:
        """Takes in what a worker says about itself."""
        worker.take_report(report, now)
        if self.card is None:
            self.card = report.card
        worker.excluded = _identity(report.card) != _identity(self.card)

    # ---- store nodes

    def update_store(self, events: BlockEvents) -> bool:
        """Takes in what changed on a store node. False if events are missing before these, which are then unused."""
        if events.snapshot:
            self.prefixes.forget(events.node_id)
        elif not self._continues(events):
            return False
        self.prefixes.apply(events.node_id, events.events)
        next_seq = events.first_seq + len(events.events)
        self.stores[events.node_id] = StoreView(events.incarnation, next_seq, events.num_slots)
        return True

    def lose_store(self, node_id: NodeId, incarnation: str) -> None:
        """Its blocks are nowhere any more. Does nothing if another incarnation has taken its place."""
        store = self.stores.get(node_id)
        if store is not None and store.incarnation == incarnation:
            del self.stores[node_id]
            self.prefixes.forget(node_id)

    def _continues(self, events: BlockEvents) -> bool:
        store = self.stores.get(events.node_id)
        return (
            store is not None
            and not store.resyncing
            and store.incarnation == events.incarnation
            and store.next_seq == events.first_seq
        )

    def _usable(self, worker: WorkerView, now: float) -> bool:
        return (
            worker.report is not None
            and not worker.report.draining
            and not worker.draining
            and not worker.excluded
            and now - worker.reported_at <= STALE_AFTER_S
            and worker.store in self.stores
        )

    def _elect_card(self) -> None:
        """The first worker's card is the cluster's for as long as anyone shows it; then the next one's is."""
        if self.card is None or any(_identity(card) == _identity(self.card) for card in self._cards()):
            return
        self.card = next(self._cards(), None)
        for worker in self.workers.values():
            worker.excluded = worker.report is not None and (
                self.card is None or _identity(worker.report.card) != _identity(self.card)
            )

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
