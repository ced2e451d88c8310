"""One choice of a request: what it asks for, and what has come of it so far."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from perigee.kvstore import blocks
from perigee.kvstore.blocks import BlockKey
from perigee.scheduler.slo import NO_SLO, Slo
from perigee.workers.engine.sequence import FinishReason, Ref, Sampling, Sequence, Token
from perigee.workers.messages import ModelCard


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the Conductor expected of an attempt, in seconds from the request's arrival."""

    ttft_s: float = 0.0
    tbt_s: float = 0.0


class Output(Protocol):
    """Where a choice's tokens go."""

    def admitted(self, cached_tokens: int, prediction: Prediction) -> None:
        """The prompt is computed, all but `cached_tokens` of it, and the first token may go out. Called once."""

    def feed(self, token: Token, reason: FinishReason) -> bool:
        """Takes the next token. Returns whether the output ends here, for `reason` or at a stop string."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, the keys of their blocks, and the request's field that they come from."""

    field: str
    token_ids: tuple[int, ...]
    block_keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One choice of a request, as every attempt at it starts. `deadline_s` is Unix time, `arrived_s` monotonic.

    `choice` names it within the request, `draw` among the choices of its prompt.
    """

    request_id: str
    choice: int
    draw: int
    prompt: Prompt
    sampling: Sampling
    seed: int
    card: ModelCard
    salt: bytes
    arrived_s: float
    deadline_s: float
    tenant: str = ""
    priority: int = 0  # higher goes first
    slo: Slo = NO_SLO


class Progress:
    """What has come of a job in all attempts so far. Owned by the dispatcher, which alone adds to it.

    Times are of the monotonic clock.
    """

    def __init__(self, job: Job, output: Output) -> None:
        self.job = job
        self._output = output
        self._admitted = False  # the Conductor said Proceed once, so the client may have heard of us
        self._tokens: list[int] = []
        self._first_at_s = 0.0
        self._last_at_s = 0.0
        self.max_tbt_s = 0.0  # 0 if there were fewer than two tokens

    @property
    def num_tokens(self) -> int:
        """Output tokens so far."""
        return len(self._tokens)

    @property
    def remaining(self) -> int:
        """Output tokens still to come at the most."""
        return self.job.sampling.max_tokens - len(self._tokens)

    @property
    def mean_tbt_s(self) -> float:
        """0 if there were fewer than two tokens."""
        gaps = len(self._tokens) - 1
        return (self._last_at_s - self._first_at_s) / gaps if gaps > 0 else 0.0

    def sequence(self, attempt: int) -> Sequence:
        """The prompt and all tokens received so far, for the given attempt."""
        job = self.job
        token_ids = job.prompt.token_ids + tuple(self._tokens)
        return Sequence(
            ref=Ref(job.request_id, job.choice, attempt),
            token_ids=token_ids,
            prompt_len=len(job.prompt.token_ids),
            block_keys=self._block_keys(token_ids),
            sampling=job.sampling,
            seed=job.seed,
            deadline_s=job.deadline_s,
            salt=job.salt,
            draw=job.draw,
        )

    def admit(self, cached_tokens: int, prediction: Prediction) -> bool:
        """An attempt may proceed. Returns whether it is the first: later ones find our own blocks cached."""
        first = not self._admitted
        if first:
            self._admitted = True
            self._output.admitted(min(cached_tokens, len(self.job.prompt.token_ids)), prediction)
        return first

    def add(self, token: Token, reason: FinishReason, now_s: float) -> tuple[float, bool]:
        """Takes the next token. Returns the seconds since the last one (or arrival), and whether the output ended."""
        gap_s = now_s - (self._last_at_s if self._tokens else self.job.arrived_s)
        if self._tokens:
            self.max_tbt_s = max(self.max_tbt_s, gap_s)
        else:
            self._first_at_s = now_s
        self._last_at_s = now_s
        self._tokens.append(token.token)
        if reason is FinishReason.NOT_FINISHED and self.remaining == 0:
            reason = FinishReason.LENGTH
        return gap_s, self._output.feed(token, reason)

    def _block_keys(self, token_ids: tuple[int, ...]) -> tuple[BlockKey, ...]:
        """Hashes only the blocks that hold output: the full blocks of the prompt have their keys already."""
        size = self.job.card.block_tokens
        known = self.job.prompt.block_keys
        if len(token_ids) == len(self.job.prompt.token_ids):
            return known
        full = len(self.job.prompt.token_ids) // size
        if full == 0:
            return prompt_keys(self.job.card, token_ids, self.job.salt)
        # The salt is in block 0, which is among the known.
        return known[:full] + tuple(blocks.chain(known[full - 1], token_ids[full * size :], size))


def prompt_keys(card: ModelCard, token_ids: tuple[int, ...], salt: bytes) -> tuple[BlockKey, ...]:
    """The keys of all blocks of `token_ids`, private to the tenant of `salt` from the first on."""
    return tuple(blocks.chain(BlockKey(card.namespace), token_ids, card.block_tokens, salt))


def cached_by_tier(dram: int, ssd: int, remote: int) -> Mapping[str, int]:
    """As the metrics label it."""
    return {"dram": dram, "ssd": ssd, "remote": remote}
