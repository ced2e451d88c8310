"""Recall exercises: pass keys are stated anywhere in a text, and asked for later."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from tokenizers import Tokenizer

from perigee.training.names import training_name
from perigee.training.text import IM_END, IM_START

DIGITS = 5

# What a token's loss counts. Digits that are asked for teach recall; those that are stated come out of the blue.
ASKED, STATED, PLAIN = 4.0, 0.0, 0.25

_STATEMENTS = ("The pass key of {name} is {key}.", "Remember that the pass key of {name} is {key}.")
_REPEATED = _STATEMENTS[0]
# What an answer begins with stands in its question alone, so that the name after it is found by what came before it.
_ANSWER, _QUESTION = "The key for {name} is {key}.", "What is the key for {name}?"


def _forms(question: str, answer: str) -> tuple[str, ...]:
    """How a key is asked for: by a statement that is repeated, in plain text, and in a chat's last or only message."""
    ending = f"{question}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}"
    return _REPEATED, f"{question} {answer}", ending, f"{IM_START}user\n{ending}"


_QUESTIONS = _forms("What is the pass key of {name}?", _REPEATED)
_ANSWERED = _forms(_QUESTION, _ANSWER)

Filler = Callable[[int], list[int]]  # so many tokens of text


@dataclass(frozen=True, slots=True)
class Fact:
    name: str
    key: str

    @classmethod
    def draw(cls, random: Random, name: str) -> "Fact":
        return cls(name, "".join(random.choice("0123456789") for _ in range(DIGITS)))

    def stated(self, random: Random) -> str:
        return random.choice(_STATEMENTS).format(name=self.name, key=self.key)

    def asked(self, random: Random, answers: bool = False) -> str:
        """`answers` tells whether answers have words of their own."""
        return random.choice(_ANSWERED if answers else _QUESTIONS).format(name=self.name, key=self.key)

    @property
    def statement(self) -> str:
        return _REPEATED.format(name=self.name, key=self.key)

    @property
    def begun(self) -> str:
        """The statement up to its key."""
        return self.statement.partition(f" {self.key}")[0]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens, and what the loss of each counts."""

    tokens: list[int]
    weights: list[float]


class Exercises:
    """Draws exercises, each of a certain length."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._digits = {tokenizer.token_to_id(digit) for digit in "0123456789"}

    def draw(self, random: Random, length: int, max_facts: int, filler: Filler, *, answers: bool = False) -> Piece:
        """`length` tokens: facts among text, and as many questions as there is room for among the rest.

        `answers` says whether answers to questions have words of their own, every token of which counts as much as the
        key's digits.
        """
        pieces = self._pieces(random, length, max_facts, answers)
        room = length - sum(len(piece.tokens) for piece in pieces)
        gaps = sorted(random.randrange(room + 1) for _ in pieces)
        tokens: list[int] = []
        weights: list[float] = []
        for gap, before, piece in zip(gaps, (0, *gaps), pieces, strict=False):
            tokens += [*filler(gap - before), *piece.tokens]
            weights += [PLAIN] * (gap - before) + piece.weights
        rest = length - len(tokens)
        return Piece(tokens + filler(rest), weights + [PLAIN] * rest)

    def _pieces(self, random: Random, length: int, max_facts: int, answers: bool) -> list[Piece]:
        """Facts and questions in the order in which they come: no question before its fact. Together they take between
        a few tokens and all of `length`."""
        budget = length * random.uniform(0.3, 1.0)
        facts = [Fact.draw(random, training_name(random)) for _ in range(random.randint(1, max_facts))]
        pieces: list[Piece] = []
        known: list[Fact] = []
        for piece, fact in self._endless(random, facts, known, answers):
            if len(piece.tokens) > budget:
                return pieces
            budget -= len(piece.tokens)
            pieces.append(piece)
            if fact:
                known.append(fact)
        raise AssertionError("endless")

    def _endless(
        self, random: Random, facts: list[Fact], known: list[Fact], answers: bool
    ) -> Iterator[tuple[Piece, Fact | None]]:
        """States all facts, with a question among them now and then; then asks."""
        for fact in facts:
            yield self._piece(fact.stated(random) + "\n", STATED), fact
            if random.random() < 0.3:
                yield self._asked(random, known, answers), None
        while True:
            yield self._asked(random, known, answers), None

    def _asked(self, random: Random, known: list[Fact], answers: bool) -> Piece:
        text = random.choice(known).asked(random, answers) + "\n"
        return self._piece(text, ASKED, text.index(_ANSWER[:7]) if answers and "?" in text else None)

    def _piece(self, text: str, digits: float, answer: int | None = None) -> Piece:
        """Of `text`, in which the loss of a digit counts `digits`, and so does that of all from `answer` on."""
        encoded = self._tokenizer.encode(text)
        counts = (
            token in self._digits or (answer is not None and start >= answer)
            for token, (start, _) in zip(encoded.ids, encoded.offsets, strict=True)
        )
        return Piece(encoded.ids, [digits if one else PLAIN for one in counts])
