"""What a run is made of: its recipe, and the text and the vocabulary that it is trained on."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from perigee.training import nano
from perigee.training.config import TrainConfig
from perigee.training.data import Corpus
from perigee.training.loop import Trainer
from perigee.training.recipe import Recipe, Shape
from perigee.training.staged import StagedTrainer
from perigee.training.text import digest, documents, is_held_out, make_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Material:
    """`config` is the config.json of what comes out."""

    recipe: Recipe
    corpus: Corpus
    tokenizer: Tokenizer
    config: Mapping[str, Any]

    def trainer(self) -> Trainer:
        """At the first step."""
        if self.recipe.stages:
            return StagedTrainer(self.recipe, self.corpus, self.tokenizer)
        return Trainer(self.recipe, self.corpus)


def by_flags(config: TrainConfig) -> Material:
    """Of a model that flags describe. Raises TrainingError for text that does not suffice."""
    texts = documents(config.text, config.text_bytes)
    tokenizer = make_tokenizer([text for text in texts if not is_held_out(text)], config.vocab_size)
    recipe = _recipe(config, digest(texts))
    return Material(recipe, Corpus.of(texts, tokenizer, config.context), tokenizer, recipe.shape.config())


def built_in(seed: int) -> Material:
    """Of moonlight-nano. Warns if the shipped model was made of other text."""
    texts = documents(None, nano.TEXT_BYTES)
    if digest(texts) != nano.TEXT_DIGEST:
        logger.warning("this Python's library is not that of the shipped model, nor will what comes out be")
    tokenizer = nano.nano_tokenizer(texts)
    corpus = Corpus.of(texts, tokenizer, max(stage.length for stage in nano.STAGES))
    return Material(nano.nano_recipe(seed, digest(texts)), corpus, tokenizer, nano.nano_config())


def _recipe(config: TrainConfig, text_digest: str) -> Recipe:
    shape = Shape(
        vocab_size=config.vocab_size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        experts=config.experts,
        experts_per_token=config.experts_per_token,
        context=config.context,
    )
    return Recipe(
        shape=shape,
        optimizer=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        sequences=config.sequences,
        steps=config.steps,
        seed=config.seed,
        dtype=config.dtype,
        text_digest=text_digest,
    )
