"""What a step trains on: text, and recall exercises in text."""

from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from perigee.training.data import Corpus, seed_of
from perigee.training.recall import Exercises
from perigee.training.stage import Stage

# One exercise of so many has a gap in its positions, so that facts are recalled from further than it is long (PoSE).
_GAP_OF = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's sequences: the tokens, [sequences, length + 1]; what the loss of each but the first counts, and the
    positions of all but the last, each [sequences, length]."""

    tokens: Tensor
    weights: Tensor
    positions: Tensor


class Lessons:
    """Batches, the same for the same seed and step."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, max_context: int) -> None:
        self.corpus = corpus
        self.max_context = max_context
        self._exercises = Exercises(tokenizer)

    def batch(self, stage: Stage, seed: int, step: int) -> Batch:
        """Exercises first, then text."""
        random = Random(seed_of(seed, step))
        exercises = [self._exercise(stage, random) for _ in range(_share(stage, random))]
        tokens = self.corpus.batch(seed, step, stage.sequences - len(exercises), stage.length)
        text = [(row, torch.ones(stage.length), torch.arange(stage.length)) for row in tokens]
        return Batch(*(torch.stack(parts) for parts in zip(*exercises, *text, strict=True)))

    def _exercise(self, stage: Stage, random: Random) -> tuple[Tensor, Tensor, Tensor]:
        training = self.corpus.training

        def filler(count: int) -> list[int]:
            start = random.randrange(len(training) - count)
            return training[start : start + count].tolist()

        piece = self._exercises.draw(random, stage.length + 1, stage.max_facts, filler, answers=stage.answers)
        return torch.tensor(piece.tokens), torch.tensor(piece.weights[1:]), self._positions(stage.length, random)

    def _positions(self, length: int, random: Random) -> Tensor:
        positions = torch.arange(length)
        if random.randrange(_GAP_OF) == 0:
            positions[random.randrange(1, length) :] += random.randrange(self.max_context - length)
        return positions


def _share(stage: Stage, random: Random) -> int:
    """How many of a batch's sequences are exercises: in the mean, the stage's share."""
    return int(stage.recall * stage.sequences + random.random())
