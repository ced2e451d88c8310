"""A worker in virtual time: what the roles do with engine and store, as in `workers.prefill` and `workers.decode`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

from perigee.kvstore.blocks import DECODE, PREFILL
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.messages import Acquired, CommittedBlock, Fetched, LeasedBlock
from perigee.kvstore.waiting import Result
from perigee.replay.keys import ROOT, output_keys
from perigee.replay.simulator.clock import Clock
from perigee.replay.simulator.engine import Engine, Steps
from perigee.replay.simulator.legs import FirstToken, Gaps, Leg
from perigee.replay.simulator.network import Link
from perigee.replay.simulator.node import Node
from perigee.scheduler.cost import CostProfile
from perigee.workers.engine.batcher import Active, Batcher, Chunk
from perigee.workers.engine.sequence import FinishReason, Ref, Sequence
from perigee.workers.messages import ModelCard, WorkerReport

Role = Literal["prefill", "decode", "mixed"]
ROLES: dict[str, Role] = {"prefill": "prefill", "decode": "decode", "mixed": "mixed"}

INCARNATION = "1"


class Listener(Protocol):
    """The front end that owns the sequences."""

    def prefilled(self, worker: "Worker", first: FirstToken) -> None: ...

    def joined(self, ref: Ref) -> None: ...

    def decoded(self, ref: Ref, gaps: tuple[Gaps, ...], reason: FinishReason) -> None: ...

    def failed(self, ref: Ref, worker: "Worker", code: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Habits:
    """What all workers of a cluster do alike.

    With `layerwise`, blocks are copied into the pages while the layers before theirs compute; else between two steps.
    """

    profile: CostProfile
    layers: int
    layerwise: bool
    caches: bool
    saves_outputs: bool
    store_wait_s: float


class Worker:
    """An engine and the node's store. `changed` is called when a report would tell something new."""

    def __init__(
        self,
        name: str,
        role: Role,
        clock: Clock,
        node: Node,
        batcher: Batcher,
        habits: Habits,
        stages: int,
        listener: Listener,
        changed: Callable[["Worker"], None],
    ) -> None:
        self.name = name
        self.role = role
        self.node = node
        self.engine = Engine(clock, batcher, habits.profile, self, stages, habits.layers if habits.layerwise else 1)
        self.computed_prompt_tokens = 0
        self._block_tokens = batcher.pool.page_tokens
        self._clock = clock
        self._habits = habits
        self._listener = listener
        self._changed = changed
        self._legs: dict[Ref, Leg] = {}
        load_token_s = habits.profile.load_token_s
        self._loads = Link(1 / load_token_s if load_token_s else float("inf"))

    # ---- what the front end says -----------------------------------------------------------------------------------

    def start(self, sequence: Sequence, source: str, rank: float, output_tokens: int) -> None:
        """To prefill, and if the role is mixed, decode."""
        leg = Leg(sequence, source, output_tokens, self._clock.now, hands_over=self.role == "prefill", prefills=True)
        self._open(leg, rank)

    def prepare(self, sequence: Sequence, source: str, rank: float, output_tokens: int) -> None:
        """To decode what another worker prefills."""
        self._open(Leg(sequence, source, output_tokens, self._clock.now), rank)

    def proceed(self, sequence: Sequence) -> None:
        """To decode what was prepared: `sequence` has the token that prefill sampled."""
        leg = self._legs[sequence.ref]
        leg.last_token_at = self._clock.now
        leg.joins = partial(self._join, leg, sequence)
        self._join_if_loaded(leg)

    def end(self, ref: Ref) -> None:
        """Forgets an attempt, wherever it stands: it was handed over, has ended, or nobody wants it."""
        leg = self._legs.pop(ref, None)
        if leg is None:
            return
        leg.is_over = True
        if leg.active is None or ref in self.engine.batcher.active:
            self.engine.remove(ref)
        if leg.group:
            self.node.release(leg.group)
        self._changed(self)

    def set_role(self, role: Role) -> None:
        """What comes from now on is done in this role. Does nothing while there is any attempt."""
        if self._legs:
            return
        self.role = role
        batcher = self.engine.batcher
        batcher.limits = replace(batcher.limits, prompts_just_in_time=role != "decode")
        self._changed(self)

    @property
    def num_attempts(self) -> int:
        return len(self._legs)

    def report(self, card: ModelCard) -> WorkerReport:
        """The state now."""
        batcher = self.engine.batcher
        steps, context_tokens, last_step_s = self.engine.progress()
        return WorkerReport(
            worker_id=self.name,
            incarnation=INCARNATION,
            role=self.role,
            card=card,
            queued_sequences=len(batcher.waiting),
            queued_prefill_tokens=batcher.queued_prefill_tokens if self.role != "decode" else 0,
            running_sequences=len(batcher.active),
            context_tokens=context_tokens,
            free_pages=batcher.pool.num_free,
            total_pages=batcher.pool.num_pages,
            max_sequences=batcher.limits.max_sequences,
            last_step_s=last_step_s,
            steps_total=steps,
        )

    # ---- what the engine says --------------------------------------------------------------------------------------

    def admitted(self, active: Active) -> None:
        leg = self._legs[active.ref]
        leg.active = active
        if not leg.prefills:
            self._fetch(leg)
        elif self._habits.caches:
            self._load_prefix(leg)
        else:
            self.engine.ready(active, 0)

    def stepped(self, steps: Steps) -> None:
        """Blocks are saved before anyone hears of a token: it may end its sequence."""
        legs = [(leg, chunk) for chunk in steps.chunks if (leg := self._legs.get(chunk.active.ref))]
        for leg, chunk in legs:
            if leg.prefills:
                self._note_prefill(leg, chunk, steps)
            if self._habits.caches:
                self._save(leg, chunk, steps)
        for leg, chunk in legs:
            if chunk.samples and not leg.is_over:
                (self._first_token if leg.prefills else self._tokens)(leg, chunk.active, steps)
        self._changed(self)

    def _note_prefill(self, leg: Leg, chunk: Chunk, steps: Steps) -> None:
        self.computed_prompt_tokens += chunk.length
        if leg.started_at is None:
            leg.started_at = steps.began_at

    def _first_token(self, leg: Leg, active: Active, steps: Steps) -> None:
        assert leg.started_at is not None
        leg.prefills = False
        leg.last_token_at = steps.ended_at
        first = FirstToken(
            leg.ref,
            active.finish_reason,
            leg.cached(),
            queue_s=max(0.0, leg.started_at - leg.arrived_at - leg.load_s),
            load_s=leg.load_s,
            compute_s=steps.ended_at - leg.started_at,
        )
        if leg.hands_over:
            self.engine.remove(leg.ref)
        self._listener.prefilled(self, first)

    def _tokens(self, leg: Leg, active: Active, steps: Steps) -> None:
        gaps = _gaps(leg.last_token_at, steps)
        leg.last_token_at = steps.ended_at
        if active.finish_reason is not FinishReason.NOT_FINISHED:
            self.end(leg.ref)
        self._listener.decoded(leg.ref, gaps, active.finish_reason)

    # ---- prefill ---------------------------------------------------------------------------------------------------

    def _load_prefix(self, leg: Leg) -> None:
        """Leases the cached prefix and takes slots for the rest, after what `source` has more of it was pulled."""
        leg.group = self.node.group()
        leg.load_began_at = self._clock.now
        if leg.source:
            keys = leg.sequence.block_keys
            self.node.fetch(leg.group, keys, 0.0, leg.source, ROOT, partial(self._pulled, leg))
        else:
            self._acquire(leg)

    def _pulled(self, leg: Leg, result: Result) -> None:
        if leg.is_over:
            return
        if not isinstance(result, Fetched):
            self._acquire(leg)
            return
        leg.pulled.update(block.index for block in result.blocks if block.remote)
        if result.done:
            self._acquire(leg)

    def _acquire(self, leg: Leg) -> None:
        assert leg.group is not None
        habits = self._habits
        keys = leg.sequence.block_keys
        self.node.acquire(leg.group, keys, ROOT, habits.store_wait_s, partial(self._acquired, leg))

    def _acquired(self, leg: Leg, result: Result) -> None:
        if leg.is_over:
            return
        if not isinstance(result, Acquired):
            self._fail(leg, "no_room")
            return
        leg.leased = result.leased
        leg.slots = {reservation.index: reservation for reservation in result.reserved}
        tokens = sum(block.num_tokens for block in result.leased)
        assert leg.active is not None
        if self._habits.layerwise:
            _, loaded_at = self._loads.book(tokens, self._clock.now)
            leg.load_s = loaded_at - leg.load_began_at
            self.engine.ready(leg.active, tokens, loaded_at)
        else:
            copy_s = self._habits.profile.load_s(tokens)
            leg.load_s = self._clock.now - leg.load_began_at + copy_s  # without the steps that it waits for
            self.engine.copy(copy_s, partial(self._loaded_prefix, leg, tokens))

    def _loaded_prefix(self, leg: Leg, tokens: int) -> None:
        if not leg.is_over:
            assert leg.active is not None
            self.engine.ready(leg.active, tokens)

    # ---- blocks that a step completed

    def _save(self, leg: Leg, chunk: Chunk, steps: Steps) -> None:
        """Those that have a slot are written while their pages are at hand, others if there is room."""
        stop, block_tokens = chunk.stop, self._block_tokens
        if not leg.slots and stop % block_tokens:
            return  # which most steps do
        written: list[CommittedBlock] = []
        for block in chunk.blocks(block_tokens):
            if reserved := leg.slots.pop(block, None):
                end = min((block + 1) * block_tokens, stop)
                origin = PREFILL if end <= leg.sequence.prompt_len else DECODE
                written.append(CommittedBlock(reserved.slot, reserved.nonce, end - block * block_tokens, origin))
            elif self._habits.saves_outputs and (block + 1) * block_tokens <= stop:
                self._save_output(leg, block)
        if written:
            assert leg.group is not None
            self.node.commit(leg.group, written, steps.began_at)

    def _save_output(self, leg: Leg, block: int) -> None:
        """A block that grew while decoding, if there is room."""
        group = self.node.group()
        sequence, block_tokens = leg.sequence, self._block_tokens
        *parents, key = output_keys(
            sequence.block_keys,
            sequence.ref.request_id,
            sequence.prompt_len,
            (block + 1) * block_tokens,
            block_tokens,
        )
        parent = parents[-1] if parents else ROOT
        self.node.acquire(group, [key], parent, 0.0, partial(self._saved_output, group))

    def _saved_output(self, group: GroupId, result: Result) -> None:
        if isinstance(result, Acquired) and result.reserved:
            (reserved,) = result.reserved
            written = CommittedBlock(reserved.slot, reserved.nonce, self._block_tokens, DECODE)
            self.node.commit(group, [written], self._clock.now)
        self.node.release(group)

    # ---- decode ----------------------------------------------------------------------------------------------------

    def _fetch(self, leg: Leg) -> None:
        """Gets every block, those too that are yet to be computed."""
        habits = self._habits
        leg.group = self.node.group()
        keys = leg.sequence.block_keys
        self.node.fetch(leg.group, keys, habits.store_wait_s, leg.source, ROOT, partial(self._fetched, leg))

    def _fetched(self, leg: Leg, result: Result) -> None:
        if leg.is_over:
            return
        if not isinstance(result, Fetched) or result.missing:
            self._fail(leg, "blocks_missing")
            return
        leg.fetched = result.done
        if result.blocks:
            leg.loads += 1
            self._copy(result.blocks, partial(self._loaded, leg))
        else:
            self._join_if_loaded(leg)

    def _copy(self, blocks: Iterable[LeasedBlock], then: Callable[[], None]) -> None:
        tokens = sum(block.num_tokens for block in blocks)
        if self._habits.layerwise:
            _, loaded_at = self._loads.book(tokens, self._clock.now)
            self._clock.at(loaded_at, then)
        else:
            self.engine.copy(self._habits.profile.load_s(tokens), then)

    def _loaded(self, leg: Leg) -> None:
        if not leg.is_over:
            leg.loads -= 1
            self._join_if_loaded(leg)

    def _join_if_loaded(self, leg: Leg) -> None:
        if leg.fetched and not leg.loads:
            if leg.group:
                self.node.release(leg.group)
                leg.group = None
            if leg.joins:
                leg.joins()

    def _join(self, leg: Leg, sequence: Sequence) -> None:
        assert leg.active is not None
        leg.joins = None
        self._listener.joined(leg.ref)
        self.engine.batcher.extend(leg.active, sequence)
        self.engine.ready(leg.active, len(sequence.token_ids) - 1)
        self._changed(self)

    # ---- both ------------------------------------------------------------------------------------------------------

    def _open(self, leg: Leg, rank: float) -> None:
        self._legs[leg.ref] = leg
        if self.engine.batcher.refusal(leg.sequence, leg.hands_over):
            self._fail(leg, "invalid")
            return
        self.engine.add(leg.sequence, one_token=leg.hands_over, rank=rank, output_tokens=leg.output_tokens)
        self._changed(self)

    def _fail(self, leg: Leg, code: str) -> None:
        self.end(leg.ref)
        self._listener.failed(leg.ref, self, code)


def _gaps(last_token_at: float, steps: Steps) -> tuple[Gaps, ...]:
    """The times between a sequence's tokens, its last one before the steps included."""
    if steps.count == 1 or steps.began_at == last_token_at:
        return (Gaps((steps.ended_at - last_token_at) / steps.count, steps.count),)
    others_s = (steps.ended_at - steps.first_at) / (steps.count - 1)
    return Gaps(steps.first_at - last_token_at, 1), Gaps(others_s, steps.count - 1)
