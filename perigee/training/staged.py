"""A run in stages: shorter sequences first, exercises among the text, MoBA for most of it and full attention last."""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from perigee.training.data import Corpus
from perigee.training.lessons import Lessons
from perigee.training.loop import Trainer
from perigee.training.recipe import Recipe

# Of the held-out text, whose loss is measured under the attention of the stage.
MEASURED_SEQUENCES, MEASURED_LENGTH = 16, 512
_AT_ONCE = 4


class StagedTrainer(Trainer):
    """A `Trainer` of a recipe with stages."""

    def __init__(self, recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer) -> None:
        super().__init__(recipe, corpus)
        self.lessons = Lessons(corpus, tokenizer, recipe.shape.context)

    def loss(self, step: int) -> Tensor:
        stage = self.recipe.stage_at(step)
        self.model.decoder.set_attention(stage.attention)
        batch = self.lessons.batch(stage, self.recipe.seed, step)
        return self.model.loss(batch.tokens, batch.weights, batch.positions)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        self.model.publish()
        length = min(MEASURED_LENGTH, self.recipe.shape.context)
        rows = torch.split(self.corpus.measured(MEASURED_SEQUENCES, length), _AT_ONCE)
        return sum(self.model.loss(row).item() * len(row) for row in rows) / sum(map(len, rows))
