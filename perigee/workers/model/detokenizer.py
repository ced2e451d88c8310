"""One output's tokens as text, as they come."""

from collections.abc import Sequence

from perigee.workers.model.tokenizer import Tokenizer


class Detokenizer:
    """Turns the tokens of one output into text as they come, at a cost per token that does not grow with the output.

    A token may hold a part of a character only, so what may still become one is held back until the rest has come.
    `context` is the end of the prompt: some tokenizers write a token differently at the very start of a text.
    """

    # A character is at most four bytes, so an unfinished one decodes to at most three replacement characters.
    _MAX_HELD = 3
    _CONTEXT = 6
    _MAX_WINDOW = 32

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # A fallback byte is no context: a run of them is decoded as a whole, whatever part of it has gone out.
        before = [token for token in context[-self._CONTEXT :] if not tokenizer.is_fallback_byte(token)]
        self._window: list[int] = []  # the last tokens
        self._fresh = 0  # those of the window before this index are text that has gone out
        self._emitted = 0  # how many characters of the window's text have gone out
        self._restart(before, [])

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes, perhaps none."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        stable = self._stable(text)
        new = text[self._emitted : stable]
        self._emitted = max(self._emitted, stable)
        if stable == len(text):
            before, done = self._window[: self._fresh], self._window[self._fresh :]
            self._restart(before if any(map(self._tokenizer.is_fallback_byte, done)) else done, [])
        elif len(self._window) > self._MAX_WINDOW:  # a long run of bytes that are no text
            self._restart(self._window[: self._fresh], self._window[-2 * self._MAX_HELD :])
        return new

    def flush(self) -> str:
        """What is still held back, when no more tokens come."""
        return self._tokenizer.decode(self._window)[self._emitted :]

    def _restart(self, before: list[int], unfinished: list[int]) -> None:
        """Forgets all tokens but these: `before` has gone out as text and is context for what comes."""
        self._window = before + unfinished
        self._fresh = len(before)
        self._emitted = self._stable(self._tokenizer.decode(self._window))

    def _stable(self, text: str) -> int:
        """How many characters of `text` cannot change by what follows."""
        return max(len(text.rstrip("\ufffd")), len(text) - self._MAX_HELD)
