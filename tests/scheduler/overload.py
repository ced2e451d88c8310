"""A small cluster in virtual time under a real Conductor: prompts one by one, decode batches that grow and shrink.

It knows nothing of blocks, networks or failures. What it is for is the load of decode over time, and what of the work
was in vain, for one admission policy beside another.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from perigee.kvstore.blocks import BlockKey
from perigee.scheduler.commands import Dispatch, Proceed, Reject
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.events import (
    BlockEvents,
    Finished,
    Joined,
    PrefillDone,
    RequestArrived,
    Tick,
    WorkerJoined,
)
from perigee.scheduler.ids import NodeId, ServerId, WorkerId
from perigee.scheduler.policies import make_policies
from perigee.scheduler.slo import Slo
from perigee.workers.engine.sequence import Ref
from perigee.workers.messages import ModelCard, WorkerReport

BLOCK_TOKENS = 512
STORE = NodeId("store")
SERVER = ServerId("server")
CARD = ModelCard("m", "w", "c", "t", "bfloat16", BLOCK_TOKENS, 1 << 18, 1000, bytes(32))

# About LLaMA3-70B on eight A800.
PROFILE = CostProfile(
    prefill_fixed_s=0.02,
    prefill_token_s=1.2e-4,
    prefill_pair_s=1.5e-9,
    load_token_s=0.0,
    step_fixed_s=0.03,
    step_sequence_s=2e-4,
    step_context_token_s=1.4e-7,
)

SLO = Slo(30.0, 0.1)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, and how long its answer will really be."""

    at: float
    num_tokens: int
    output_tokens: int
    priority: int = 0
    tenant: str = ""


@dataclass(slots=True)
class Running:
    """A sequence on a decode worker."""

    ask: Ask
    ref: Ref
    ends_at_step: float = 0.0
    joined_at: float = 0.0
    late_steps: float = 0.0
    late_before: float = 0.0


@dataclass(slots=True)
class Decoder:
    """One decode worker. Steps are counted as a real number."""

    id: WorkerId
    steps: float = 0.0
    late_steps: float = 0.0  # of them, those that took longer than the bound
    stepped_at: float = 0.0
    context: float = 0.0
    batch: dict[Ref, Running] = field(default_factory=dict)
    waiting: list[Running] = field(default_factory=list)
    pages: int = 0
    version: int = 0


# A promise of TBT is kept if so many of the steps are within it.
_MAY_BE_LATE = 0.1


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    rejected_early: int = 0
    rejected_late: int = 0
    good: int = 0
    finished: int = 0
    ttft_s: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)  # of the decode pool every second: TBT over its bound
    batch: list[float] = field(default_factory=list)
    retry_after_s: list[float] = field(default_factory=list)
    rejected_by_priority: dict[int, int] = field(default_factory=dict)

    @property
    def rejected(self) -> int:
        return self.rejected_early + self.rejected_late


class Overload:
    """Runs requests through a cluster of so many workers under an admission policy."""

    def __init__(
        self,
        admission: str,
        prefill: int = 8,
        decode: int = 8,
        slo: Slo = SLO,
        max_tokens: int = 2048,
        profile: CostProfile = PROFILE,
        places: int = 256,
        pages: int = 2700,
    ) -> None:
        self.conductor = Conductor(make_policies(admission=admission), profile)
        self.slo, self.max_tokens, self.profile = slo, max_tokens, profile
        self.places, self.total_pages = places, pages
        self.now = 0.0
        self.outcome = Outcome()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._prefill_queue: dict[WorkerId, list[tuple[float, int, Running, WorkerId]]] = {}
        self._prefill_busy: dict[WorkerId, bool] = {}
        self._decoders: dict[WorkerId, Decoder] = {}
        self._open = 0
        self.conductor.handle(BlockEvents(STORE, "1", 0, (), snapshot=True), 0.0)
        for role, count in (("prefill", prefill), ("decode", decode)):
            for index in range(count):
                worker = WorkerId(f"{role}-{index}")
                self.conductor.handle(WorkerJoined(worker, "1", "", STORE), 0.0)
                if role == "prefill":
                    self._prefill_queue[worker], self._prefill_busy[worker] = [], False
                else:
                    self._decoders[worker] = Decoder(worker)
        self._report()

    def run(self, asks: Iterable[Ask]) -> Outcome:
        for index, ask in enumerate(asks):
            self._at(ask.at, partial(self._arrive, Ref(str(index)), ask))
            self._open += 1
        self._at(1.0, self._tick)
        while self._heap:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        return self.outcome

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._order), action))

    # ---- requests

    def _arrive(self, ref: Ref, ask: Ask) -> None:
        num_blocks = -(-ask.num_tokens // BLOCK_TOKENS)
        keys = tuple(BlockKey(f"{ref.request_id}:{index}".encode().ljust(32)) for index in range(num_blocks))
        event = RequestArrived(
            SERVER, ref, keys, ask.num_tokens, self.max_tokens, tenant=ask.tenant, priority=ask.priority, slo=self.slo
        )
        (command,) = self.conductor.handle(event, self.now)
        if isinstance(command, Reject):
            self.outcome.rejected_early += 1
            by = self.outcome.rejected_by_priority
            by[ask.priority] = by.get(ask.priority, 0) + 1
            self.outcome.retry_after_s.append(command.retry_after_s)
            self._open -= 1
            return
        assert isinstance(command, Dispatch)
        running = Running(ask, ref)
        queue = self._prefill_queue[command.prefill.id]
        heapq.heappush(queue, (command.rank, next(self._order), running, command.decode.id))
        self._next_prompt(command.prefill.id)

    def _next_prompt(self, worker: WorkerId) -> None:
        if self._prefill_busy[worker] or not self._prefill_queue[worker]:
            return
        _, _, running, decoder = heapq.heappop(self._prefill_queue[worker])
        self._prefill_busy[worker] = True
        compute_s = self.profile.prefill_s(running.ask.num_tokens, 0)
        self._at(self.now + compute_s, lambda: self._prefilled(worker, running, decoder, compute_s))

    def _prefilled(self, worker: WorkerId, running: Running, decoder: WorkerId, compute_s: float) -> None:
        self._prefill_busy[worker] = False
        self._next_prompt(worker)
        ttft_s = self.now - running.ask.at
        (command,) = self.conductor.handle(
            PrefillDone(SERVER, running.ref, compute_s=compute_s, ttft_s=ttft_s), self.now
        )
        if isinstance(command, Reject):
            self.outcome.rejected_late += 1
            self._open -= 1
            return
        assert isinstance(command, Proceed)
        self.outcome.ttft_s.append(ttft_s)
        self._decoders[decoder].waiting.append(running)
        self._change(self._decoders[decoder])

    def _pages(self, running: Running) -> int:
        return -(-(running.ask.num_tokens + self.max_tokens) // BLOCK_TOKENS)

    def _change(self, decoder: Decoder) -> None:
        """Lets in who waits, as far as there is room, and looks for who is next to end."""
        self._advance(decoder)
        while decoder.waiting and len(decoder.batch) < self.places:
            running = decoder.waiting[0]
            if decoder.pages + self._pages(running) > self.total_pages:
                break
            decoder.waiting.pop(0)
            decoder.pages += self._pages(running)
            running.ends_at_step = decoder.steps + max(1, running.ask.output_tokens - 1)
            running.joined_at, running.late_before = self.now, decoder.late_steps
            decoder.batch[running.ref] = running
            decoder.context += running.ask.num_tokens
            self.conductor.handle(Joined(SERVER, running.ref), self.now)
        self._schedule_end(decoder)

    def _schedule_end(self, decoder: Decoder) -> None:
        decoder.version += 1
        if not decoder.batch:
            return
        first = min(decoder.batch.values(), key=lambda running: running.ends_at_step)
        after_s = max(0.0, first.ends_at_step - decoder.steps) * self._step_s(decoder)
        version = decoder.version
        self._at(self.now + after_s, lambda: self._ended(decoder, first, version))

    def _ended(self, decoder: Decoder, running: Running, version: int) -> None:
        if version != decoder.version:
            return
        self._advance(decoder)
        steps = max(1, running.ask.output_tokens - 1)
        decoder.context -= running.ask.num_tokens + steps
        decoder.pages -= self._pages(running)
        del decoder.batch[running.ref]
        late = (decoder.late_steps - running.late_before) / steps
        self.outcome.finished += 1
        self.outcome.good += late <= _MAY_BE_LATE
        mean_tbt_s = (self.now - running.joined_at) / steps
        self.conductor.handle(Finished(SERVER, running.ref, running.ask.output_tokens, mean_tbt_s), self.now)
        self._open -= 1
        self._change(decoder)

    def _step_s(self, decoder: Decoder) -> float:
        return self.profile.step_s(len(decoder.batch), decoder.context)

    def _advance(self, decoder: Decoder) -> None:
        if decoder.batch:
            step_s = self._step_s(decoder)
            steps = (self.now - decoder.stepped_at) / step_s
            decoder.steps += steps
            decoder.late_steps += steps * (step_s > self.slo.tbt_s)
            decoder.context += steps * len(decoder.batch)
        decoder.stepped_at = self.now

    # ---- the clock

    def _tick(self) -> None:
        self._report()
        self.conductor.handle(Tick(), self.now)
        loads = [self._step_s(decoder) / self.slo.tbt_s for decoder in self._decoders.values()]
        self.outcome.load.append(float(np.mean(loads)))
        self.outcome.batch.append(float(np.mean([len(decoder.batch) for decoder in self._decoders.values()])))
        if self._open:
            self._at(self.now + 1.0, self._tick)

    def _report(self) -> None:
        for worker in self._prefill_queue:
            queued = sum(entry[2].ask.num_tokens for entry in self._prefill_queue[worker])
            self._say(worker, "prefill", queued_prefill_tokens=queued, free_pages=self.total_pages)
        for decoder in self._decoders.values():
            self._advance(decoder)
            self._schedule_end(decoder)
            self._say(
                decoder.id,
                "decode",
                running_sequences=len(decoder.batch),
                queued_sequences=len(decoder.waiting),
                context_tokens=int(decoder.context),
                free_pages=self.total_pages - decoder.pages,
                last_step_s=self._step_s(decoder) if decoder.batch else 0.0,
                steps_total=int(decoder.steps),
            )

    def _say(self, worker: WorkerId, role: str, free_pages: int, **fields: Any) -> None:
        self.conductor.handle(
            WorkerReport(
                worker,
                "1",
                role,
                CARD,
                free_pages=free_pages,
                total_pages=self.total_pages,
                max_sequences=self.places,
                **fields,
            ),
            self.now,
        )
