"""A large cluster for `perigee bench conductor`, in the Conductor's ears alone: what it would hear, and when."""

import gc
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from random import Random
from time import perf_counter

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.messages import BlockEvent, Tier
from perigee.scheduler.commands import Command, Dispatch
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.events import (
    BlockEvents,
    Event,
    Finished,
    Joined,
    PrefillDone,
    RequestArrived,
    Tick,
    WorkerJoined,
)
from perigee.scheduler.ids import NodeId, RequestKey, ServerId, WorkerId
from perigee.scheduler.policies import Policies
from perigee.scheduler.slo import Slo
from perigee.scheduler.worker_view import WorkerView
from perigee.workers.engine.sequence import Ref
from perigee.workers.messages import ModelCard, WorkerReport

BLOCK_TOKENS = 512
SERVER = ServerId("server")

CARD = ModelCard(
    name="large",
    weights_digest="w",
    config_digest="c",
    tokenizer_digest="t",
    dtype="bfloat16",
    block_tokens=BLOCK_TOKENS,
    max_context=1 << 18,
    vocab_size=1 << 17,
    namespace=bytes(32),
)

# About a 70B model on eight large GPUs a worker.
PROFILE = CostProfile(
    prefill_fixed_s=0.02,
    prefill_token_s=7e-5,
    prefill_pair_s=7e-10,
    load_token_s=2e-6,
    promote_token_s=3e-5,
    transfer_fixed_s=2e-3,
    transfer_token_s=3e-6,
    step_fixed_s=0.02,
    step_sequence_s=1e-4,
    step_context_token_s=5e-8,
)

_TOTAL_PAGES = 4096
_MAX_SEQUENCES = 256
_OUTPUT_TOKENS = 300
_REPORT_S = 0.25
_SLO = Slo(ttft_s=30.0, tbt_s=0.1)

# Prefill workers are this busy.
_UTILISATION = 0.7

# All conversations begin with the same few blocks, which every node holds, and grow by turns.
_SHARED_BLOCKS = 4
_TURN_BLOCKS = 12
_TURNS = (1, 2, 4, 8, 21)

# So many messages are made before they are timed.
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Conversation:
    """Its keys are made from its number when they are needed: the memory that is measured is the Conductor's."""

    number: int
    num_blocks: int

    def keys(self, start: int, stop: int) -> tuple[BlockKey, ...]:
        return tuple(_key(self.number if index >= _SHARED_BLOCKS else 0, index) for index in range(start, stop))


@dataclass(frozen=True, slots=True)
class BlockFigures:
    """Of the events that told about the blocks, and of the memory that these take."""

    events_per_s: float
    bytes_per_block: float


@dataclass(frozen=True, slots=True)
class DecisionFigures:
    """Seconds that each arrival took, and all that was said about these requests later on, by request."""

    arrivals_s: list[float]
    later_s: float

    @property
    def per_s(self) -> float:
        return len(self.arrivals_s) / sum(self.arrivals_s)

    def quantile_s(self, quantile: float) -> float:
        return sorted(self.arrivals_s)[int(quantile * len(self.arrivals_s))]


class Scene:
    """A Conductor that hears what a cluster would tell it, whose clock is the scene's."""

    def __init__(self, num_workers: int, policies: Policies) -> None:
        self._chance = Random(7)
        self._now = 0.0
        self._conductor = Conductor(policies, PROFILE)
        self._numbers = itertools.count(1)
        self._conversations: list[Conversation] = []
        self._nodes = [NodeId(f"node-{index}") for index in range(num_workers)]
        self._next_seq = dict.fromkeys(self._nodes, 0)
        for node in self._nodes:
            self._hear(BlockEvents(node, "1", 0, (), snapshot=True, num_slots=1 << 20))
        for index, node in enumerate(self._nodes):
            self._hear(WorkerJoined(WorkerId(f"worker-{index}"), "1", "unix:/worker", node))
        self._coming: list[tuple[float, int, Event]] = []
        self._report()

    # ---- blocks

    def fill(self, num_blocks: int) -> BlockFigures:
        """Tells of blocks until so many are known."""
        gc.collect()
        memory_before = _resident_bytes()
        seconds, num_events, messages = 0.0, 0, self._stores(num_blocks)
        while chunk := list(itertools.islice(messages, _CHUNK)):
            num_events += sum(len(message.events) for message in chunk)
            seconds += self._time(chunk)
        gc.collect()
        memory = _resident_bytes() - memory_before
        return BlockFigures(num_events / seconds, memory / len(self._conductor.view.prefixes))

    def _stores(self, num_blocks: int) -> Iterator[BlockEvents]:
        """One message for each turn of each conversation and each node that has it."""
        shared = Conversation(0, _SHARED_BLOCKS)
        for node in self._nodes:
            yield self._message(node, shared.keys(0, _SHARED_BLOCKS))
        known = _SHARED_BLOCKS
        while known < num_blocks:
            turns = self._chance.choice(_TURNS)
            conversation = Conversation(next(self._numbers), _SHARED_BLOCKS + turns * _TURN_BLOCKS)
            self._conversations.append(conversation)
            known += turns * _TURN_BLOCKS
            yield from self._history(conversation)

    def _history(self, conversation: Conversation) -> Iterator[BlockEvents]:
        """A prefill and a decode node hold all of it, others what came before it moved there; some is on SSD."""
        prefill, decode = self._chance.sample(self._nodes, 2)
        starts = range(_SHARED_BLOCKS, conversation.num_blocks, _TURN_BLOCKS)
        for start in starts:
            keys = conversation.keys(start, start + _TURN_BLOCKS)
            yield self._message(prefill, keys)
            yield self._message(decode, keys)
            if self._chance.random() < 0.1:
                yield self._message(decode, keys, Tier.SSD)
                yield self._message(decode, keys, Tier.DRAM, stored=False)
        if self._chance.random() < 0.5:
            end = self._chance.choice(starts) + _TURN_BLOCKS
            yield self._message(self._chance.choice(self._nodes), conversation.keys(_SHARED_BLOCKS, end))

    def _message(
        self, node: NodeId, keys: tuple[BlockKey, ...], tier: Tier = Tier.DRAM, stored: bool = True
    ) -> BlockEvents:
        first_seq = self._next_seq[node]
        self._next_seq[node] = first_seq + len(keys)
        events = tuple(BlockEvent(stored, key, tier) for key in keys)
        return BlockEvents(node, "1", first_seq, events, num_slots=1 << 20)

    # ---- decisions

    @property
    def num_in_flight(self) -> int:
        """Requests that were placed and have not ended."""
        return len(self._conductor.view.requests)

    def decide(self, num_blocks: int, count: int) -> DecisionFigures:
        """Has `count` prompts placed, after half as many that bring the cluster to its usual load."""
        arrivals_s: list[float] = []
        later_s, interval_s = 0.0, self._interval_s(num_blocks)
        requests = (self._request(num_blocks) for _ in range(count + count // 2))
        while chunk := list(itertools.islice(requests, _CHUNK)):
            gc.freeze()  # the collector need not go through what only waits to be told
            for request in chunk:
                self._now += interval_s
                elapsed_s = self._catch_up()
                arrivals_s.append(self._place(request))
                later_s += elapsed_s
        return DecisionFigures(arrivals_s[count // 2 :], later_s / len(arrivals_s))

    def _place(self, request: RequestArrived) -> float:
        """The seconds that it takes until a request has its answer."""
        started = perf_counter()
        commands = self._hear(request)
        elapsed_s = perf_counter() - started
        self._follow(request, commands[0])
        return elapsed_s

    def _interval_s(self, num_blocks: int) -> float:
        """Between arrivals, where half of each prompt is cached."""
        half = num_blocks * BLOCK_TOKENS / 2
        return PROFILE.prefill_s(half, half) / (_UTILISATION * len(self._nodes) / 2)

    def _request(self, num_blocks: int) -> RequestArrived:
        """The next turn of a conversation: it may be new from anywhere on."""
        number = next(self._numbers)
        known = self._chance.choice(self._conversations)
        while known.num_blocks > num_blocks or 4 * known.num_blocks < num_blocks:
            known = self._chance.choice(self._conversations)
        stop = self._chance.randint(_SHARED_BLOCKS, known.num_blocks)
        keys = known.keys(0, stop) + Conversation(number, num_blocks).keys(stop, num_blocks)
        tenant = f"tenant-{number % 20}"
        num_tokens = num_blocks * BLOCK_TOKENS - 100
        return RequestArrived(SERVER, Ref(str(number)), keys, num_tokens, 2 * _OUTPUT_TOKENS, tenant=tenant, slo=_SLO)

    def _follow(self, request: RequestArrived, command: Command) -> None:
        """What comes of a request is what was predicted of it."""
        if not isinstance(command, Dispatch):
            return
        computed_at = self._now + command.predicted_ttft_s
        finished_at = computed_at + command.predicted_tbt_s * _OUTPUT_TOKENS
        flight = self._conductor.view.requests[RequestKey.of(SERVER, request.ref)]
        done = PrefillDone(SERVER, request.ref, compute_s=flight.work_s, ttft_s=command.predicted_ttft_s)
        finished = Finished(SERVER, request.ref, _OUTPUT_TOKENS, command.predicted_tbt_s)
        later = ((computed_at, done), (computed_at + 0.05, Joined(SERVER, request.ref)), (finished_at, finished))
        for at, event in later:
            heapq.heappush(self._coming, (at, next(self._numbers), event))

    def _catch_up(self) -> float:
        """All that was to come by now comes. Returns the seconds that it took, without those for reports."""
        due: list[Event] = []
        while self._coming and self._coming[0][0] <= self._now:
            due.append(heapq.heappop(self._coming)[2])
        if self._now >= self._report_at:
            self._report()
        return self._time(due)

    def _report(self) -> None:
        """Every worker says how it is."""
        self._report_at = self._now + _REPORT_S
        for index in range(len(self._nodes)):
            self._hear(self._report_of(index))
        self._hear(Tick())

    def _report_of(self, index: int) -> WorkerReport:
        worker = self._conductor.view.workers[WorkerId(f"worker-{index}")]
        return WorkerReport(
            worker.id,
            worker.incarnation,
            "prefill" if index % 2 else "decode",
            CARD,
            queued_prefill_tokens=_queued_tokens(worker),
            running_sequences=worker.placed.sequences,
            context_tokens=worker.placed.context_tokens,
            free_pages=_TOTAL_PAGES - worker.placed.pages,
            total_pages=_TOTAL_PAGES,
            max_sequences=_MAX_SEQUENCES,
        )

    def _time(self, events: Sequence[Event]) -> float:
        """The seconds that it takes to tell these."""
        started = perf_counter()
        for event in events:
            self._hear(event)
        return perf_counter() - started

    def _hear(self, event: Event) -> list[Command]:
        return self._conductor.handle(event, self._now)


def _key(conversation: int, index: int) -> BlockKey:
    return BlockKey(blake2b(f"{conversation}/{index}".encode(), digest_size=32).digest())


def _queued_tokens(worker: WorkerView) -> int:
    return sum(prompt.new_tokens for prompt in worker.prefills.values())


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux says how much memory a process has")
