"""Prompts: random tokens, and text that a model has something to say to."""

import random
import re
from collections.abc import Callable, Sequence

from tests.tiny_llama import CORPUS

_FIRST_ORDINARY = 3  # below are the special tokens of the tiny model

_OPENINGS = (
    "Explain to a child why the sky is blue.",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "The three most important things to know about volcanoes are",
    "Dear Professor, I am writing to you because",
    "Q: What is the capital of Australia?\nA:",
    "To bake a loaf of bread, first",
    "In 1969, two astronauts",
)


def random_prompt(length: int, vocab_size: int, seed: str) -> list[int]:
    """`length` ordinary tokens that depend on the arguments alone. Another seed shares no prefix, as good as surely."""
    return random.Random(f"{seed}/{length}").choices(range(_FIRST_ORDINARY, vocab_size), k=length)


def text_prompts(lengths: Sequence[int], encode: Callable[[str], Sequence[int]]) -> list[list[int]]:
    """One prompt for each length in tokens: numbered, so that none shares a block with another, and cut to length."""
    return [list(encode(_text(index, length)))[:length] for index, length in enumerate(lengths)]


def _text(index: int, num_tokens: int) -> str:
    """Varied sentences of at least `num_tokens` tokens, as a sentence has more than five."""
    chooser = random.Random(index)
    sentences = re.findall(r"\S[^.]*\.", CORPUS.replace("\n", " "))
    body = chooser.choices(sentences, k=num_tokens // 5)
    return " ".join([f"{index + 1}.", _OPENINGS[index % len(_OPENINGS)], *body])
