"""One choice's tokens as text: whole characters only, ended at a stop string, each token's log-probability with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from perigee.workers.engine.sequence import FinishReason, Token
from perigee.workers.model.detokenizer import Detokenizer
from perigee.workers.model.tokenizer import Tokenizer

Finish = Literal["stop", "length"]
_FINISH: dict[FinishReason, Finish] = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """A token and where in the output's text it begins, in characters."""

    token: Token
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one more token added to a choice: text that will not change any more, and the tokens that it begins with."""

    choice: int
    text: str
    tokens: tuple[PlacedToken, ...]
    finish_reason: Finish | None


class StopFinder:
    """Finds the first stop string in text that comes in pieces, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that may go out, and whether it ends at a stop string; then what came after it is dropped."""
        text = self._held + text
        if (cut := self._first(text)) is not None:
            self._held = ""
            return text[:cut], True
        safe = len(text) - self._possible_beginning(text)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """What is still held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> int | None:
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        return min(found, default=None)

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class Transcript:
    """Turns tokens into pieces of one choice. Stop strings count only after `min_tokens` tokens."""

    def __init__(
        self, choice: int, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str], min_tokens: int
    ) -> None:
        self._choice = choice
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopFinder(stops)
        self._unheeded = min_tokens  # tokens whose text is not searched
        self._decoded = 0  # characters that the tokens so far stand for
        self._sent = 0  # characters that went out
        self._waiting: list[PlacedToken] = []  # tokens whose text did not go out yet
        self.num_tokens = 0

    def feed(self, token: Token, reason: FinishReason) -> Piece:
        """The next token; a token that is itself the reason to stop has no text. Nothing may follow a finish reason."""
        self.num_tokens += 1
        if reason is FinishReason.STOP:
            return self._end("", reason)
        self._waiting.append(PlacedToken(token, self._decoded))
        text = self._detokenizer.feed(token.token)
        if reason is not FinishReason.NOT_FINISHED:
            return self._end(text, reason)
        self._decoded += len(text)
        sent, stopped = self._search(text)
        return self._piece(sent, "stop" if stopped else None)

    def _search(self, text: str) -> tuple[str, bool]:
        if self.num_tokens <= self._unheeded:
            return text, False
        return self._stops.feed(text)

    def _end(self, text: str, reason: FinishReason) -> Piece:
        text += self._detokenizer.flush()
        self._decoded += len(text)
        sent, stopped = self._search(text)
        if stopped:
            return self._piece(sent, "stop")
        return self._piece(sent + self._stops.flush(), _FINISH[reason])

    def _piece(self, text: str, finish: Finish | None) -> Piece:
        """`text` goes out now, and with it the tokens that begin in it or, at the end, right after it."""
        self._sent += len(text)
        whole = finish is not None and self._sent == self._decoded
        ready = tuple(placed for placed in self._waiting if whole or placed.offset < self._sent)
        self._waiting = self._waiting[len(ready) :]
        return Piece(self._choice, text, ready, finish)
