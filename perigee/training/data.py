"""Batches of tokens, the same for the same seed and step: nothing is to be kept to go on after a stop."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from perigee.training.errors import TrainingError
from perigee.training.text import END_OF_TEXT, is_held_out


def seed_of(seed: int, step: int) -> int:
    """Of a step's random draws. A generator's first ones from nearby seeds are not independent enough; a product
    spreads them."""
    return (seed * 1_000_003 + step) * 0x9E3779B97F4A7C15 % 2**63


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens to train on and tokens to measure with, each [tokens] int64, from different documents."""

    training: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: Tokenizer, length: int) -> "Corpus":
        """Raises TrainingError if either part is too short for a sequence of `length` tokens and the one after it."""
        parts: tuple[list[int], list[int]] = [], []
        for text in texts:
            parts[is_held_out(text)].extend(tokenizer.encode(text + END_OF_TEXT).ids)
        training, held_out = map(torch.tensor, parts)
        for name, part in (("trained on", training), ("held out", held_out)):
            if len(part) <= length:
                raise TrainingError(f"text: {len(part)} tokens of it are {name}, needed are {length + 1} or more")
        return cls(training, held_out)

    def batch(self, seed: int, step: int, sequences: int, length: int) -> Tensor:
        """[sequences, length + 1] from anywhere in the training tokens."""
        generator = torch.Generator().manual_seed(seed_of(seed, step))
        starts = torch.randint(len(self.training) - length, (sequences,), generator=generator)
        return self.training[starts[:, None] + torch.arange(length + 1)]

    def measured(self, sequences: int, length: int) -> Tensor:
        """[up to `sequences`, length + 1] spread evenly over the held-out tokens."""
        count = min(sequences, len(self.held_out) // (length + 1))
        starts = torch.arange(count) * (len(self.held_out) - length - 1) // max(1, count - 1)
        return self.held_out[starts[:, None] + torch.arange(length + 1)]
