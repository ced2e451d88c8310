"""The loss of text that a model has not seen, through the engine that serves it."""

from collections.abc import Sequence
from statistics import mean

import torch
from torch import Tensor
from torch.nn import functional as F

from perigee.workers.engine.engine import Engine
from perigee.workers.engine.sequence import Ref, Sampling
from perigee.workers.engine.sequence import Sequence as TokenSequence
from perigee.workers.model.tokenizer import Tokenizer

MEASURED_LENGTH = 2048  # tokens of a sequence


def token_rows(tokenizer: Tokenizer, text: str, count: int) -> list[list[int]]:
    """Up to `count` sequences of MEASURED_LENGTH tokens, spread evenly over `text`."""
    tokens = tokenizer.encode(text)
    count = min(count, len(tokens) // MEASURED_LENGTH)
    starts = [index * (len(tokens) - MEASURED_LENGTH) // max(1, count - 1) for index in range(count)]
    return [tokens[start : start + MEASURED_LENGTH] for start in starts]


def loss_of(engine: Engine, rows: Sequence[Sequence[int]]) -> float:
    """The mean cross-entropy in nats of each token but a row's first, given those before."""
    return mean(_loss(engine, row) for row in rows)


def _loss(engine: Engine, row: Sequence[int]) -> float:
    hidden: list[Tensor] = []
    model = engine.runner.model
    hook = model.layers[-1].register_forward_hook(
        lambda module, arguments, output: hidden.append(output[0] + output[1])
    )
    sequence = TokenSequence(Ref("loss"), tuple(row), len(row), (), Sampling(temperature=0.0, max_tokens=1))
    engine.run_alone(sequence)
    hook.remove()
    with torch.inference_mode():
        logits = model.logits(torch.cat(hidden)[: len(row) - 1])
    return F.cross_entropy(logits, torch.tensor(row[1:])).item()
