"""Prompts that state pass keys in the midst of text, and end in one of the statements begun again."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from perigee.training.names import held_out_name
from perigee.training.recall import Fact
from perigee.workers.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Needle:
    """A prompt, the key that is to follow, and where it is stated, as a part of the prompt's length."""

    prompt: tuple[int, ...]
    key: str
    depth: float


def haystacks(
    tokenizer: Tokenizer, text: str, random: Random, length: int, num_facts: int, count: int
) -> Iterator[Needle]:
    """`count` prompts of about, and at most, `length` tokens. What is asked for moves evenly through them; the other
    facts lie anywhere. Names are ones that training left out."""
    for index in range(count):
        facts = [Fact.draw(random, name) for name in _names(random, num_facts)]
        depths = [(index + 0.5) / count, *(random.random() for _ in facts[1:])]
        yield Needle(_prompt(tokenizer, text, random, length, facts, depths), facts[0].key, depths[0])


def _names(random: Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names[held_out_name(random)] = None
    return list(names)


def _prompt(
    tokenizer: Tokenizer, text: str, random: Random, length: int, facts: list[Fact], depths: list[float]
) -> tuple[int, ...]:
    """The first fact is stated again, up to its key; of `text` as many lines are taken as there is room for."""
    start = random.randrange(len(text) // 2)
    lines = text[start : start + 8 * length].splitlines(keepends=True)

    def made(count: int) -> list[int]:
        return tokenizer.encode(f"{_stated(lines[:count], facts, depths)}{facts[0].begun}")

    # How many tokens lines take is known only after the fact: of all counts, half is left out each time.
    fits = bisect_right(range(1, len(lines) + 1), length, key=lambda count: len(made(count)))
    return tuple(made(fits))


def _stated(lines: list[str], facts: list[Fact], depths: list[float]) -> str:
    whole = list(lines)
    # From the back, so that what is put in moves nothing that is still to be put in before it.
    for depth, fact in sorted(zip(depths, facts, strict=True), key=lambda placed: placed[0], reverse=True):
        whole.insert(round(depth * len(lines)), f"{fact.statement}\n")
    return "".join(whole)
