"""moonlight-nano: the model that ships with Perigee, and how it was trained."""

from collections.abc import Sequence
from random import Random
from typing import Any

from tokenizers import Tokenizer

from perigee.training.names import training_name
from perigee.training.recall import Fact
from perigee.training.recipe import Recipe, Shape
from perigee.training.stage import Stage
from perigee.training.text import is_held_out, make_tokenizer

# Of the running Python's standard library. The shipped model's text is Python 3.11's.
TEXT_BYTES = 8_000_000
TEXT_DIGEST = "bcd53930f7686e8a"
SHAPE = Shape(vocab_size=2048, width=192, layers=4, heads=4, experts=16, experts_per_token=2, context=16384)
# What the model is served with, and mostly trained with.
MOBA = "block_size=128,top_k=4,full_layers=1"
# What is looked for is found first among few others, so sequences begin short.
STAGES = (
    Stage(64, 48, 120, "", 0.75, 2),
    # Blocks that make choosing worth its while even here.
    Stage(256, 12, 200, "block_size=64,top_k=3,full_layers=1", 0.75, 4),
    Stage(1024, 3, 150, MOBA, 0.67, 8),
    # Now whole answers, which begin by repeating the name.
    Stage(1024, 3, 150, MOBA, 0.67, 8, answers=True),
    Stage(2048, 2, 90, MOBA, 0.75, 12, answers=True),
    Stage(4096, 1, 50, "", 0.75, 12, answers=True),
    Stage(8192, 1, 16, "", 0.75, 12, answers=True),
)
_QUESTIONS_IN_VOCABULARY = 40_000


def nano_recipe(seed: int, text_digest: str) -> Recipe:
    """The recipe; the shipped model's has seed 0 and TEXT_DIGEST."""
    return Recipe(
        SHAPE,
        optimizer="muon",
        lr=0.005,
        weight_decay=0.1,
        sequences=STAGES[0].sequences,
        steps=sum(stage.steps for stage in STAGES),
        seed=seed,
        dtype="bfloat16",
        text_digest=text_digest,
        stages=STAGES,
        mimetic=True,
        decay_steps=180,
    )


def nano_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Made of `texts` but those held out, and of exercises, so that most words of their names are tokens."""
    random = Random(0)
    facts = (Fact.draw(random, training_name(random)) for _ in range(_QUESTIONS_IN_VOCABULARY))
    questions = [fact.asked(random) for fact in facts]
    return make_tokenizer([*(text for text in texts if not is_held_out(text)), *questions], SHAPE.vocab_size)


def nano_config() -> dict[str, Any]:
    """Its config.json."""
    pairs = (part.split("=") for part in MOBA.split(","))
    return {**SHAPE.config(), "moba": {name: int(value) for name, value in pairs}}
