"""What prefill and decode both start from: one attempt at one choice of a request."""

from collections import abc
from dataclasses import dataclass, field
from enum import IntEnum

from perigee.kvstore.blocks import NO_SALT, BlockKey


@dataclass(frozen=True, slots=True, order=True)
class Ref:
    """Names one attempt at one choice of a request. What carries an older attempt is about nobody any more."""

    request_id: str
    choice: int = 0
    attempt: int = 0

    def __hash__(self) -> int:
        return hash(self.request_id)  # which there is one of for nearly every attempt

    def __str__(self) -> str:
        return f"{self.request_id}/{self.choice}#{self.attempt}"


class FinishReason(IntEnum):
    """Why a sequence ended. The numbers are the wire's."""

    NOT_FINISHED = 0
    STOP = 1
    LENGTH = 2


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy, `top_k` 0 is off, `logprobs` None reports none."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class Sequence:
    """A prompt, the output so far, and all that decides the rest.

    `token_ids[:prompt_len]` is the prompt, what follows was generated. `block_keys` names every block of `token_ids`,
    the last, partial one included. `deadline_s` is a Unix time after which nobody waits for it, 0 for none. Randomness
    is counter-based on (seed, draw, output position), so a longer `Sequence` of the same request goes on exactly where
    the shorter one stopped, on any worker and in any batch. `draw` says which of its prompt's choices this is: unlike
    `ref.choice` it does not depend on what other prompts the request has.
    """

    ref: Ref
    token_ids: abc.Sequence[int]
    prompt_len: int
    block_keys: tuple[BlockKey, ...]
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    grammar: str = ""
    deadline_s: float = 0.0
    salt: bytes = NO_SALT
    salt_block: int = 0
    draw: int = 0

    @property
    def num_outputs(self) -> int:
        """Output tokens so far."""
        return len(self.token_ids) - self.prompt_len

    @property
    def max_len(self) -> int:
        """Tokens that prompt and output can come to."""
        return self.prompt_len + self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled token. `logprob` and `top_logprobs` are of the model's own distribution, before temperature and cuts.
    `top_logprobs` are (token, logprob) pairs, the likeliest first.
    """

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
