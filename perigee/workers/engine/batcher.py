"""Continuous batching: which sequences hold pages, and which of their tokens the next step computes.

A sequence waits until pages for all that it can ever come to are free, so nothing runs out midway. Then its cached
prefix is loaded by whoever drives the engine, and from then on every step takes one token of each decoding sequence and
fills what is left of the token budget with prompt chunks.

Pages and prompt chunks go by rank, the smallest first, and in order of arrival where ranks are equal. Nobody overtakes
for being small: whoever is first in the queue gets the next pages, however long it takes until there are enough.
"""

import itertools
from bisect import insort
from collections import abc
from dataclasses import dataclass, field
from typing import NamedTuple

from perigee.kvstore.blocks import num_blocks
from perigee.workers.engine.pages import PagePool, PageTable, pages_needed
from perigee.workers.engine.sequence import FinishReason, Ref, Sequence, Token


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one step may hold. A chunk of a prompt counts as many tokens as it has, a decoding sequence one.

    With `prompts_just_in_time` a prompt is admitted only when those before it fill no whole step any more: so it looks
    into the cache as late as it can, when what others compute meanwhile is there. One whose rank puts it before those
    that were admitted does not wait for them.

    Prompts share a step only while they have `shared_prompt_tokens` together. Some hundred tokens keep a machine as
    busy as thousands do, so beyond that nothing is gained, and who goes first would wait for those that came after.
    """

    max_batched_tokens: int
    max_sequences: int
    max_context: int
    prompts_just_in_time: bool = False
    shared_prompt_tokens: int = 512


class Turn(NamedTuple):
    """When it is a sequence's turn: by the rank that it came with, then by its number in order of arrival."""

    rank: float
    arrival: int


FIRST = Turn(0.0, 0)


@dataclass(frozen=True, slots=True)
class Queued:
    """A sequence that waits for pages."""

    turn: Turn
    sequence: Sequence
    one_token: bool


@dataclass(slots=True, eq=False)
class Active:
    """A sequence that holds pages. Only the batcher fills and changes its fields.

    `outputs` are the tokens that were sampled here, after those of `sequence`.
    """

    sequence: Sequence
    pages: PageTable
    one_token: bool  # prefill's part: ends with its first token
    num_tokens: int
    outputs: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose KVCache is in the pages
    is_ready: bool = False
    finish_reason: FinishReason = FinishReason.NOT_FINISHED
    cached: int = 0  # tokens that were loaded, not computed
    turn: Turn = FIRST

    @property
    def ref(self) -> Ref:
        return self.sequence.ref

    def tokens(self, start: int, stop: int) -> abc.Sequence[int]:
        """Those of the positions from `start` up to `stop`."""
        given = self.sequence.token_ids
        if stop <= len(given):
            return given[start:stop]
        return [*given[start:], *self.outputs[max(0, start - len(given)) : stop - len(given)]]

    @property
    def is_decoding(self) -> bool:
        """Whether all but its last token are in the pages, so that each step brings it one further."""
        return self.num_tokens - self.computed == 1

    @property
    def prompt_tokens_left(self) -> int:
        """Tokens to compute before it decodes."""
        left = self.num_tokens - self.computed
        return 0 if left == 1 else left

    @property
    def num_outputs(self) -> int:
        return self.num_tokens - self.sequence.prompt_len


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of a sequence from position `start`. If they reach its end, it `samples` the next token."""

    active: Active
    start: int
    length: int
    samples: bool

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def num_prompt_tokens(self) -> int:
        """How many of its tokens belong to the prompt."""
        return max(0, min(self.stop, self.active.sequence.prompt_len) - self.start)

    def blocks(self, block_tokens: int) -> range:
        """Indices of the blocks that it completes. The partial one at the end of what the sequence started from is
        complete too: nothing will be added to it here before it is handed over."""
        ends_start = self.stop == len(self.active.sequence.token_ids)
        stop = num_blocks(self.stop, block_tokens) if ends_start else self.stop // block_tokens
        return range(self.start // block_tokens, stop)


@dataclass(frozen=True, slots=True)
class Output:
    """A token that a step generated. `index` is its position in the output."""

    active: Active
    index: int
    token: Token

    @property
    def finish_reason(self) -> FinishReason:
        return self.active.finish_reason if self.index == self.active.num_outputs - 1 else FinishReason.NOT_FINISHED


class Batcher:
    """See the module. `eos_token_ids` end a sequence unless its sampling says otherwise."""

    def __init__(self, pool: PagePool, limits: BatchLimits, eos_token_ids: frozenset[int]) -> None:
        self.pool = pool
        self.limits = limits
        self.eos_token_ids = eos_token_ids
        self.waiting: list[Queued] = []  # by turn
        self.active: dict[Ref, Active] = {}
        self._arrivals = itertools.count()

    def pages_needed(self, sequence: Sequence, one_token: bool) -> int:
        """Pages for all tokens that `sequence` can come to here."""
        num_tokens = len(sequence.token_ids)
        max_len = num_tokens if one_token else min(sequence.max_len, self.limits.max_context)
        return pages_needed(num_tokens, max_len, self.pool.page_tokens)

    def refusal(self, sequence: Sequence, one_token: bool) -> str | None:
        """Why this sequence could never run here, or None."""
        if not sequence.token_ids:
            return "token_ids: is empty, at least one token is needed"
        if len(sequence.token_ids) > self.limits.max_context:
            return f"token_ids: {len(sequence.token_ids)} tokens, the context holds {self.limits.max_context}"
        needed = self.pages_needed(sequence, one_token)
        if needed > self.pool.num_pages:
            return f"token_ids: needs {needed} pages for prompt and max_tokens, the pool has {self.pool.num_pages}"
        return None

    def add(self, sequence: Sequence, *, one_token: bool, rank: float = 0.0) -> None:
        """Queues a sequence for pages, before those of a larger rank. The caller has asked `refusal` before."""
        queued = Queued(Turn(rank, next(self._arrivals)), sequence, one_token)
        insort(self.waiting, queued, key=_turn)

    def admit(self) -> list[Active]:
        """Gives pages to those at the head of the queue, as far as pages and places go."""
        admitted: list[Active] = []
        while self.waiting and len(self.active) < self.limits.max_sequences:
            queued = self.waiting[0]
            if self._has_prompts_enough(queued.turn):
                break
            sequence = queued.sequence
            pages = self.pool.allocate(self.pages_needed(sequence, queued.one_token))
            if pages is None:
                break
            del self.waiting[0]
            active = Active(sequence, pages, queued.one_token, len(sequence.token_ids), turn=queued.turn)
            self.active[sequence.ref] = active
            admitted.append(active)
        return admitted

    def ready(self, active: Active, num_loaded: int) -> None:
        """The first `num_loaded` tokens are in the pages. The last token is always computed: its logits are wanted."""
        active.cached = active.computed = min(num_loaded, active.num_tokens - 1)
        active.is_ready = True

    def extend(self, active: Active, sequence: Sequence) -> None:
        """Takes the place of what was prepared: the same sequence, with the tokens that were sampled since."""
        active.sequence = sequence
        active.num_tokens = len(sequence.token_ids)
        active.outputs = []

    def remove(self, ref: Ref) -> None:
        """Forgets a sequence wherever it stands, and frees its pages. Does nothing if it is not known."""
        if active := self.active.pop(ref, None):
            self.pool.free(active.pages)
        else:
            self.waiting = [queued for queued in self.waiting if queued.sequence.ref != ref]

    @property
    def has_work(self) -> bool:
        """Whether `schedule` has something for a step."""
        return any(a.is_ready and a.finish_reason is FinishReason.NOT_FINISHED for a in self.active.values())

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step: decoding sequences first, then prompts by turn, as many as may share it."""
        ready = [a for a in self.active.values() if a.is_ready and a.finish_reason is FinishReason.NOT_FINISHED]
        chunks: list[Chunk] = []
        budget, prompt_tokens = self.limits.max_batched_tokens, 0
        for active in sorted(ready, key=_prompts_last_by_turn):
            remaining = active.num_tokens - active.computed
            length = min(remaining, budget)
            if prompt_tokens and prompt_tokens + length > self.limits.shared_prompt_tokens:
                break
            if length > 0:
                chunks.append(Chunk(active, active.computed, length, samples=length == remaining))
                budget -= length
                prompt_tokens += 0 if active.is_decoding else length
        return chunks

    def apply(self, chunks: list[Chunk], tokens: list[Token]) -> list[Output]:
        """Takes in what a step computed: `tokens` has one entry for each chunk that samples, in their order."""
        outputs: list[Output] = []
        sampled = iter(tokens)
        for chunk in chunks:
            active = chunk.active
            active.computed = chunk.stop
            if chunk.samples:
                token = next(sampled)
                active.num_tokens += 1
                active.outputs.append(token.token)
                active.finish_reason = self._finish_reason(active, token.token)
                active.is_ready = not active.one_token
                outputs.append(Output(active, active.num_outputs - 1, token))
        return outputs

    def advance(self, chunks: list[Chunk], steps: int, token: int) -> list[Chunk]:
        """Takes in `steps` steps at once, `chunks` being the first one's: all of decoding sequences, each of which
        samples `token` every time, and none of which ends by that. Returns the chunks of the step that comes next.
        """
        for chunk in chunks:
            chunk.active.computed += steps
            chunk.active.num_tokens += steps
            chunk.active.outputs += [token] * steps
        return [Chunk(chunk.active, chunk.start + steps, 1, samples=True) for chunk in chunks]

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens still to be computed, as far as known: what waits may yet be found in the cache."""
        waiting = sum(len(queued.sequence.token_ids) for queued in self.waiting)
        return waiting + sum(active.prompt_tokens_left for active in self.active.values())

    @property
    def context_tokens(self) -> int:
        return sum(active.computed for active in self.active.values())

    def _has_prompts_enough(self, turn: Turn) -> bool:
        """Whether the prompts that were admitted and go before `turn` fill a step."""
        if not self.limits.prompts_just_in_time:
            return False
        before = sum(active.prompt_tokens_left for active in self.active.values() if active.turn < turn)
        return before >= self.limits.max_batched_tokens

    def _finish_reason(self, active: Active, token: int) -> FinishReason:
        sampling = active.sequence.sampling
        is_end = token in sampling.stop_token_ids or (token in self.eos_token_ids and not sampling.ignore_eos)
        if is_end and active.num_outputs > sampling.min_tokens:
            return FinishReason.STOP
        if active.num_outputs >= sampling.max_tokens or active.num_tokens >= self.limits.max_context:
            return FinishReason.LENGTH
        return FinishReason.NOT_FINISHED


def _turn(queued: Queued) -> Turn:
    return queued.turn


def _prompts_last_by_turn(active: Active) -> tuple[bool, Turn]:
    return not active.is_decoding, active.turn
