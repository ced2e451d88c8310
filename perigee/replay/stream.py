"""A streamed completion, read as it arrives: when tokens came, and what the endpoint counted."""

import json

from pydantic import BaseModel, Field, ValidationError

from perigee.replay.errors import ReplayError


class StreamError(ReplayError):
    """The stream did not bring a whole answer. `kind` is one word for the report, `detail` what is known."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


class PromptTokensDetails(BaseModel, frozen=True):
    cached_tokens: int | None = None


class Predicted(BaseModel, frozen=True):
    """What the endpoint expected."""

    ttft_s: float = Field(ge=0, allow_inf_nan=False)
    tbt_s: float = Field(ge=0, allow_inf_nan=False)


class Usage(BaseModel, frozen=True):
    """The token counts that end a stream. They alone say how many tokens came: a chunk may hold several.

    `perigee_predicted` is an extension: None where the endpoint does not tell.
    """

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    prompt_tokens_details: PromptTokensDetails | None = None
    perigee_predicted: Predicted | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return (details.cached_tokens or 0) if details else 0


class SseDecoder:
    """Cuts server-sent events into the payloads of their `data:` lines; comments and other fields are dropped.

    Every event of a completion stream is a single data line, so a line's end is the event's end.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> list[bytes]:
        """The payloads that `received` completes."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class CompletionStream:
    """One answer of one choice. `token_times_s` holds when each chunk with something of the choice arrived."""

    def __init__(self) -> None:
        self.token_times_s: list[float] = []
        self._decoder = SseDecoder()
        self._usage: Usage | None = None
        self._done = False

    def feed(self, received: bytes, now_s: float) -> None:
        """Take in what arrived at `now_s`. Raises StreamError if it is an error or no chunk of a completion."""
        for payload in self._decoder.feed(received):
            if payload == b"[DONE]":
                self._done = True
            else:
                self._see(payload, now_s)

    def finish(self) -> Usage:
        """What was counted. Raises StreamError if the stream ended before its end."""
        if not self._done:
            raise StreamError("truncated", f"the stream ended without [DONE] after {len(self.token_times_s)} chunks")
        if self._usage is None:
            raise StreamError("no_usage", "the stream ended without usage")
        return self._usage

    def _see(self, payload: bytes, now_s: float) -> None:
        chunk = _parse(payload)
        if "error" in chunk:
            raise StreamError("stream_error", json.dumps(chunk["error"]))
        if chunk.get("choices"):
            self.token_times_s.append(now_s)
        if chunk.get("usage"):
            self._usage = _usage(chunk["usage"])


def _parse(payload: bytes) -> dict[str, object]:
    try:
        chunk = json.loads(payload)
    except ValueError as error:
        raise StreamError("bad_chunk", f"{payload[:80]!r} is not JSON: {error}") from error
    if not isinstance(chunk, dict):
        raise StreamError("bad_chunk", f"{payload[:80]!r} is not a JSON object")
    return chunk


def _usage(value: object) -> Usage:
    try:
        return Usage.model_validate(value)
    except ValidationError as error:
        raise StreamError("bad_chunk", f"usage: {error}") from error
