"""One worker's engine in virtual time: the real batcher decides, a cost profile says how long it takes.

Decode steps of a batch that does not change are one event, cut short at the end of a step when something changes.

A prefill engine may be a group of nodes that pipelines chunks (Mooncake, FAST '25, section 4.1): each has an equal part
of the layers, and begins with a chunk when it is done with the one before and the node before it is done with this one.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from perigee.replay.simulator.clock import Clock
from perigee.replay.simulator.timing import Run, run_of, step_s
from perigee.scheduler.cost import CostProfile
from perigee.workers.engine.batcher import Active, Batcher, Chunk, Output
from perigee.workers.engine.sequence import Ref, Sequence, Token

TOKEN = 0
END = 1
_TOKENS = {False: Token(TOKEN), True: Token(END)}


@dataclass(frozen=True, slots=True)
class Steps:
    """What `count` steps did, each with the last of them's chunks or their like. `outputs` are the last one's."""

    began_at: float
    first_at: float  # when the first of them ended
    ended_at: float
    count: int
    chunks: list[Chunk]
    outputs: list[Output]


class EngineUser(Protocol):
    """Whom an engine tells."""

    def admitted(self, active: Active) -> None:
        """The sequence has its pages."""

    def stepped(self, steps: Steps) -> None:
        """Steps have ended."""


@dataclass(slots=True)
class _Underway:
    """Decode steps, until the last of which nothing changes."""

    run: Run
    chunks: list[Chunk]
    began_at: float
    count: int


class Engine:
    """`output_tokens` tells how long each sequence's answer comes to be; its last token is the END. `layers` are those
    of the model, by which loads go on under the computation; 1 where they don't.
    """

    def __init__(
        self, clock: Clock, batcher: Batcher, profile: CostProfile, user: EngineUser, stages: int, layers: int
    ) -> None:
        self.clock = clock
        self.batcher = batcher
        self.profile = profile
        self.output_tokens: dict[Ref, int] = {}
        self.steps_total = 0
        self.last_step_s = 0.0
        self._user = user
        self._layers = layers
        self._stage_free_at = [0.0] * stages
        self._is_busy = False
        self._underway: _Underway | None = None
        self._current: list[Chunk] = []  # of the step at hand
        self._unwanted: list[Ref] = []  # of those, to be removed when it ends
        self._loaded_at: dict[Ref, float] = {}  # of sequences whose prefix is still being loaded
        self._copies: deque[tuple[float, Callable[[], None]]] = deque()

    # ---- what the worker asks --------------------------------------------------------------------------------------

    def add(self, sequence: Sequence, *, one_token: bool, rank: float, output_tokens: int) -> None:
        """Queues a sequence for pages."""
        self.output_tokens[sequence.ref] = output_tokens
        self.batcher.add(sequence, one_token=one_token, rank=rank)
        self._admit()

    def ready(self, active: Active, num_loaded: int, loaded_at: float = 0.0) -> None:
        """Lets the sequence run, though the last layer of its first `num_loaded` tokens may come as late as that."""
        self.batcher.ready(active, num_loaded)
        if loaded_at > self.clock.now:
            self._loaded_at[active.ref] = loaded_at
        self._wake()

    def copy(self, seconds: float, then: Callable[[], None]) -> None:
        """Copies blocks between two steps."""
        self._copies.append((seconds, then))
        self._wake()

    def remove(self, ref: Ref) -> None:
        """Frees what a sequence holds, or takes it out of the queue; if it is in the step at hand, when that ends."""
        if any(chunk.active.ref == ref for chunk in self._current):
            self._unwanted.append(ref)
            self._wake()
            return
        self.output_tokens.pop(ref, None)
        self._loaded_at.pop(ref, None)
        self.batcher.remove(ref)
        self._admit()

    def progress(self) -> tuple[int, int, float]:
        """Steps since the start, tokens in the pages, and the last step's length, as of now."""
        if self._underway is None:
            return self.steps_total, self.batcher.context_tokens, self.last_step_s
        underway = self._underway
        steps = min(underway.count, underway.run.steps_within(self.clock.now - underway.began_at))
        tokens = self.batcher.context_tokens + steps * len(underway.chunks)
        return self.steps_total + steps, tokens, underway.run.first_s + max(0, steps - 1) * underway.run.growth_s

    @property
    def prefill_load_s(self) -> float:
        """What it will take to compute the prompts that are here, if the cache has nothing of those that wait. The
        nodes of a pipeline work on several chunks at once."""
        waiting = ((len(queued.sequence.token_ids), 0) for queued in self.batcher.waiting)
        begun = ((active.prompt_tokens_left, active.computed) for active in self.batcher.active.values())
        seconds = (self.profile.prefill_s(left, computed) for left, computed in (*waiting, *begun) if left)
        return sum(seconds) / len(self._stage_free_at)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        for active in self.batcher.admit():
            self._user.admitted(active)

    def _wake(self) -> None:
        """There is something that did not wait for the step at hand."""
        if not self._is_busy:
            self._is_busy = True
            self._next()
        elif underway := self._underway:
            steps = underway.run.steps_within(self.clock.now - underway.began_at)
            if self.clock.now > underway.began_at + underway.run.elapsed_s(steps):
                steps += 1
            self._cut(underway, max(1, steps))

    def _next(self) -> None:
        """Begins the next step, or nothing."""
        if self._copies:
            seconds, then = self._copies.popleft()
            self.clock.at(self.clock.now + seconds, self._copied, then)
        elif not (chunks := self.batcher.schedule()):
            self._is_busy = False
        else:
            self._current = chunks
            decodes = all(chunk.length == 1 and not chunk.active.one_token for chunk in chunks) and not self._loaded_at
            (self._begin_run if decodes else self._begin_step)(chunks)

    def _copied(self, then: Callable[[], None]) -> None:
        then()
        self._next()

    # ---- decode steps

    def _begin_run(self, chunks: list[Chunk]) -> None:
        run = run_of(self.profile, chunks)
        self._cut(_Underway(run, chunks, self.clock.now, 0), min(self._steps_left(chunk.active) for chunk in chunks))

    def _cut(self, underway: _Underway, count: int) -> None:
        """Lets the steps under way end after so many of them, if they are more."""
        if 0 < underway.count <= count:
            return
        underway.count = count
        self._underway = underway
        self.clock.at(underway.began_at + underway.run.elapsed_s(count), self._end_run, underway, count)

    def _steps_left(self, active: Active) -> int:
        """Until it ends, or has filled a block."""
        page_tokens = self.batcher.pool.page_tokens
        to_end = min(
            self.output_tokens[active.ref] - active.num_outputs, self.batcher.limits.max_context - active.num_tokens
        )
        return max(1, min(to_end, page_tokens - active.computed % page_tokens))

    def _end_run(self, underway: _Underway, count: int) -> None:
        if self._underway is not underway or underway.count != count:
            return  # it was cut
        self._underway = None
        run, began_at = underway.run, underway.began_at
        last = self.batcher.advance(underway.chunks, count - 1, TOKEN) if count > 1 else underway.chunks
        first_at = began_at + run.first_s
        self._count(count, run.first_s + (count - 1) * run.growth_s)
        outputs = self._apply(last)
        self._tell(Steps(began_at, first_at, self.clock.now, count, last, outputs))
        self._next()

    # ---- steps with prompts

    def _begin_step(self, chunks: list[Chunk]) -> None:
        began_at = left_at = self.clock.now
        seconds = self._step_s(chunks)
        for stage, free_at in enumerate(self._stage_free_at):
            left_at = max(left_at, free_at) + seconds / len(self._stage_free_at)
            self._stage_free_at[stage] = left_at
        self._count(1, seconds)
        self.clock.at(self._stage_free_at[0], self._end_first_stage, chunks, began_at, left_at)

    def _end_first_stage(self, chunks: list[Chunk], began_at: float, ends_at: float) -> None:
        """The engine may go on with the chunks after these."""
        outputs = self._apply(chunks)
        steps = Steps(began_at, ends_at, ends_at, 1, chunks, outputs)
        if ends_at <= self.clock.now:
            self._tell(steps)
        else:
            self.clock.at(ends_at, self._tell, steps)
            self._admit()
        self._next()

    def _step_s(self, chunks: list[Chunk]) -> float:
        """Every layer begins when the prefixes' blocks of that layer are loaded: only what does not fit under the
        computation comes on top of it.
        """
        seconds = step_s(self.profile, chunks)
        loaded_s = max((self._load_left_s(chunk.active) for chunk in chunks), default=0.0)
        return max(seconds, loaded_s + seconds / self._layers) if loaded_s else seconds

    def _load_left_s(self, active: Active) -> float:
        return max(0.0, self._loaded_at.pop(active.ref, 0.0) - self.clock.now)

    # ---- both

    def _apply(self, chunks: list[Chunk]) -> list[Output]:
        outputs = self.batcher.apply(chunks, self._sampled(chunks))
        self._current = []
        unwanted, self._unwanted = self._unwanted, []
        for ref in unwanted:
            self.remove(ref)
        return outputs

    def _sampled(self, chunks: Iterable[Chunk]) -> list[Token]:
        return [_TOKENS[self._is_last(chunk.active)] for chunk in chunks if chunk.samples]

    def _is_last(self, active: Active) -> bool:
        return active.num_outputs + 1 >= self.output_tokens[active.ref]

    def _count(self, steps: int, last_step_s: float) -> None:
        self.steps_total += steps
        self.last_step_s = last_step_s

    def _tell(self, steps: Steps) -> None:
        self._user.stepped(steps)
        self._admit()
