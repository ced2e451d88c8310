"""From logits to tokens, with randomness that depends on nothing but the request.

Each draw uses one uniform number, a hash of (seed, choice, output position). So a sequence draws the same tokens on any
worker, in any batch, and after any number of failures.
"""

import hashlib
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from perigee.workers.engine.sequence import Sampling, Token

# With top-p alone the nucleus is nearly always within the likeliest thousand tokens; only if not, all are sorted.
_NUCLEUS_GUESS = 1024


@dataclass(frozen=True, slots=True)
class Draw:
    """All that one draw depends on besides the logits. `outputs` are the tokens generated so far."""

    sampling: Sampling
    seed: int
    choice: int
    outputs: list[int]
    eos_token_ids: frozenset[int]


def sample(logits: Tensor, draws: list[Draw]) -> list[Token]:
    """One token for each row of `logits` [rows, vocabulary], float32."""
    if all(_is_plain_greedy(draw) for draw in draws):
        return [Token(token) for token in logits.argmax(dim=-1).tolist()]
    return [_sample_row(row, draw) for row, draw in zip(logits, draws, strict=True)]


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments."""
    digest = hashlib.blake2b(struct.pack("<QII", seed, choice, position), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _is_plain_greedy(draw: Draw) -> bool:
    sampling = draw.sampling
    return (
        sampling.temperature == 0
        and sampling.logprobs is None
        and len(draw.outputs) >= sampling.min_tokens
        and not sampling.presence_penalty
        and not sampling.frequency_penalty
    )


def _sample_row(logits: Tensor, draw: Draw) -> Token:
    adjusted = _penalize(logits, draw)
    if draw.sampling.temperature == 0:
        token = int(adjusted.argmax())
    else:
        token = _draw(adjusted / draw.sampling.temperature, draw)
    return _with_logprobs(token, logits, draw.sampling.logprobs)


def _penalize(logits: Tensor, draw: Draw) -> Tensor:
    """Presence and frequency penalties, and no end of sequence before `min_tokens`."""
    sampling = draw.sampling
    forbid_end = len(draw.outputs) < sampling.min_tokens
    if not (forbid_end or ((sampling.presence_penalty or sampling.frequency_penalty) and draw.outputs)):
        return logits
    adjusted = logits.clone()
    if draw.outputs:
        seen, counts = torch.unique(torch.tensor(draw.outputs), return_counts=True)
        adjusted[seen] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if forbid_end:
        adjusted[list(draw.eos_token_ids | set(sampling.stop_token_ids))] = -torch.inf
    return adjusted


def _draw(logits: Tensor, draw: Draw) -> int:
    """Inverse transform sampling over what top-k and top-p leave."""
    probabilities = torch.softmax(logits.double(), dim=-1)
    candidates: Tensor | None = None
    if draw.sampling.top_k or draw.sampling.top_p < 1:
        probabilities, candidates = _cut(probabilities, draw.sampling)
    cumulative = probabilities.cumsum(dim=-1)
    point = uniform(draw.seed, draw.choice, len(draw.outputs)) * float(cumulative[-1])
    index = min(int(torch.searchsorted(cumulative, point, right=True)), len(cumulative) - 1)
    return int(candidates[index]) if candidates is not None else index


def _cut(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, at most `top_k` of them and no more than it takes to hold `top_p` of the mass."""
    size = len(probabilities)
    count = min(sampling.top_k or _NUCLEUS_GUESS, size)
    top, tokens = probabilities.topk(count)
    if not sampling.top_k and float(top.sum()) < sampling.top_p:
        top, tokens = probabilities.sort(descending=True)
    if sampling.top_p < 1:
        # top-p is a share of what top-k left. A token stays while the mass before it is short of that share.
        before = top.cumsum(dim=-1) - top
        mass = float(top.sum()) if sampling.top_k else 1.0
        kept = max(1, int((before < sampling.top_p * mass).sum()))
        top, tokens = top[:kept], tokens[:kept]
    return top, tokens


def _with_logprobs(token: int, logits: Tensor, num_alternatives: int | None) -> Token:
    if num_alternatives is None:
        return Token(token)
    logprobs = torch.log_softmax(logits, dim=-1)
    values, tokens = logprobs.topk(num_alternatives)
    alternatives = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return Token(token, float(logprobs[token]), alternatives)
