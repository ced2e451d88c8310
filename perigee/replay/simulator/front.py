"""The front end in virtual time: owns every request, drives it through its life, and keeps the record of it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from perigee.kvstore.blocks import BlockKey
from perigee.replay.keys import output_keys
from perigee.replay.metrics import NOTHING_CACHED, CachedByTier, Outcome, RequestRecord, tail_tbt_of_runs
from perigee.replay.simulator.clock import Clock
from perigee.replay.simulator.control import Control
from perigee.replay.simulator.engine import END
from perigee.replay.simulator.legs import FirstToken, Gaps
from perigee.replay.simulator.worker import Worker
from perigee.scheduler.commands import Dispatch, Proceed, Reject
from perigee.scheduler.events import Failed, Finished, Joined, PrefillDone, RequestArrived
from perigee.scheduler.ids import ServerId, WorkerId
from perigee.scheduler.slo import NO_SLO, Slo
from perigee.workers.engine.sequence import FinishReason, Ref, Sampling, Sequence

SERVER = ServerId("server")
MAX_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client asks for. The answer comes to `output_tokens`, of which only the client's bound is known."""

    request_id: str
    arrival_s: float
    prompt_len: int
    prompt_keys: tuple[BlockKey, ...]
    output_tokens: int
    max_tokens: int
    priority: int = 0
    tenant: str = ""
    slo: Slo = NO_SLO


@dataclass(slots=True, eq=False)
class Flight:
    """What has come of a request so far, in all attempts up to `ref`."""

    ask: Ask
    ref: Ref
    prefill: Worker | None = None
    decode: Worker | None = None
    tokens: int = 0
    cached: CachedByTier = NOTHING_CACHED
    first_at: float = 0.0
    last_at: float = 0.0
    gaps: list[Gaps] = field(default_factory=list)
    plan: Dispatch | None = None  # of the last attempt

    def try_again(self) -> None:
        self.ref = replace(self.ref, attempt=self.ref.attempt + 1)

    @property
    def mean_tbt_s(self) -> float:
        return (self.last_at - self.first_at) / (self.tokens - 1) if self.tokens > 1 else 0.0


class FrontEnd:
    """Sends what arrives to the Conductor, and does with it what it says. Every request ends with one `on_record`."""

    def __init__(self, clock: Clock, control: Control, block_tokens: int, on_record: Callable[[RequestRecord], None]):
        self._clock = clock
        self._control = control
        self._block_tokens = block_tokens
        self._on_record = on_record
        self.flights: dict[str, Flight] = {}

    def arrive(self, ask: Ask) -> None:
        flight = self.flights[ask.request_id] = Flight(ask, Ref(ask.request_id))
        self._place(flight)

    # ---- what the Conductor says -----------------------------------------------------------------------------------

    def _place(self, flight: Flight) -> None:
        ask, sequence = flight.ask, self._sequence(flight)
        arrived = RequestArrived(
            SERVER,
            flight.ref,
            sequence.block_keys,
            len(sequence.token_ids),
            ask.max_tokens - flight.tokens,
            self._clock.now - ask.arrival_s,
            ask.tenant,
            ask.priority,
            ask.slo,
        )
        (command,) = self._control.tell(arrived)
        match command:
            case Dispatch():
                self._dispatch(flight, sequence, command)
            case Reject():
                self._rejected(flight, command, "at arrival")

    def _dispatch(self, flight: Flight, sequence: Sequence, plan: Dispatch) -> None:
        ref, output_tokens = flight.ref, flight.ask.output_tokens
        flight.plan = plan
        flight.prefill = self._control.workers[plan.prefill.id]
        flight.decode = self._control.workers[plan.decode.id]
        flight.prefill.start(sequence, plan.prefill_source, plan.rank, output_tokens)
        is_coupled = flight.prefill is flight.decode or flight.ask.max_tokens - flight.tokens == 1
        if not is_coupled and flight.ref == ref:
            flight.decode.prepare(sequence, plan.decode_source, plan.rank, output_tokens)

    def _rejected(self, flight: Flight, command: Reject, stage: str) -> None:
        if flight.tokens:  # the client was promised an answer: it waits for room
            flight.try_again()
            self._clock.at(self._clock.now + max(0.05, command.retry_after_s), self._place, flight)
            return
        record = self._record(flight, Outcome.REJECTED)
        self._close(flight, replace(record, rejection=f"{command.reason.name.lower()} {stage}"))

    # ---- what workers say ------------------------------------------------------------------------------------------

    def prefilled(self, worker: Worker, first: FirstToken) -> None:
        flight = self.flights[first.ref.request_id]
        now = self._clock.now
        done = PrefillDone(
            SERVER,
            first.ref,
            first.cached.total,
            first.queue_s,
            first.load_s,
            first.compute_s,
            now - flight.ask.arrival_s,
        )
        (command,) = self._control.tell(done)
        match command:
            case Proceed():
                self._proceed(flight, first)
            case Reject():
                self._end_legs(flight)
                self._rejected(flight, command, "after prefill")

    def _proceed(self, flight: Flight, first: FirstToken) -> None:
        assert flight.prefill is not None and flight.decode is not None
        now = self._clock.now
        if flight.tokens == 0:
            flight.first_at, flight.cached = now, first.cached
        else:
            flight.gaps.append(Gaps(now - flight.last_at, 1))
        flight.tokens, flight.last_at = flight.tokens + 1, now
        if first.finish_reason is not FinishReason.NOT_FINISHED:
            self._finish(flight)
        elif flight.prefill is flight.decode:
            self._control.tell(Joined(SERVER, first.ref))
        else:
            flight.decode.proceed(self._sequence(flight))

    def joined(self, ref: Ref) -> None:
        flight = self.flights[ref.request_id]
        assert flight.prefill is not None
        flight.prefill.end(ref)
        self._control.tell(Joined(SERVER, ref))

    def decoded(self, ref: Ref, gaps: tuple[Gaps, ...], reason: FinishReason) -> None:
        flight = self.flights[ref.request_id]
        flight.gaps += gaps
        flight.tokens += sum(each.count for each in gaps)
        flight.last_at = self._clock.now
        if reason is not FinishReason.NOT_FINISHED:
            self._finish(flight)

    def failed(self, ref: Ref, worker: Worker, code: str) -> None:
        flight = self.flights.get(ref.request_id)
        if flight is None or flight.ref != ref:
            return
        self._end_legs(flight)
        self._control.tell(Failed(SERVER, ref, WorkerId(worker.name), code))
        flight.try_again()
        if flight.ref.attempt < MAX_ATTEMPTS and code != "invalid":
            self._clock.at(self._clock.now, self._place, flight)
        else:
            self._close(flight, replace(self._record(flight, Outcome.FAILED), failure=code, detail=worker.name))

    # ---- ends ------------------------------------------------------------------------------------------------------

    def _finish(self, flight: Flight) -> None:
        self._end_legs(flight)
        self._control.tell(Finished(SERVER, flight.ref, flight.tokens, flight.mean_tbt_s))
        self._close(flight, self._record(flight, Outcome.COMPLETED))

    def _end_legs(self, flight: Flight) -> None:
        for worker in (flight.prefill, flight.decode):
            if worker is not None:
                worker.end(flight.ref)

    def _close(self, flight: Flight, record: RequestRecord) -> None:
        del self.flights[flight.ask.request_id]
        self._on_record(record)

    def _record(self, flight: Flight, outcome: Outcome) -> RequestRecord:
        ask = flight.ask
        record = RequestRecord(
            outcome,
            due_s=ask.arrival_s,
            sent_s=ask.arrival_s,
            ended_s=self._clock.now,
            prompt_tokens=ask.prompt_len,
            priority=ask.priority,
        )
        if flight.tokens == 0:
            return record
        return replace(
            record,
            cached_tokens=flight.cached.total,
            cached_by_tier=flight.cached,
            output_tokens=flight.tokens,
            ttft_s=flight.first_at - ask.arrival_s,
            tbt_s=tail_tbt_of_runs([(each.seconds, each.count) for each in flight.gaps]),
            mean_tbt_s=flight.mean_tbt_s if flight.tokens > 1 else None,
            predicted_ttft_s=flight.plan.predicted_ttft_s if flight.plan else None,
            predicted_tbt_s=flight.plan.predicted_tbt_s if flight.plan else None,
        )

    def _sequence(self, flight: Flight) -> Sequence:
        """The prompt and all tokens received so far. Nobody asks what they are, so they are numbers in a row."""
        ask, tokens = flight.ask, flight.tokens
        length = ask.prompt_len + tokens
        return Sequence(
            flight.ref,
            range(length),
            ask.prompt_len,
            output_keys(ask.prompt_keys, ask.request_id, ask.prompt_len, length, self._block_tokens),
            Sampling(max_tokens=ask.max_tokens, stop_token_ids=(END,)),
        )
