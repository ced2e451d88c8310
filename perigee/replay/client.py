"""Requests to an OpenAI-compatible endpoint, and what they took."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import aiohttp
from pydantic import BaseModel

from perigee.replay.errors import EndpointError
from perigee.replay.metrics import Outcome, RequestRecord, mean_tbt_s, tail_tbt_s
from perigee.replay.stream import CompletionStream, StreamError

TOO_MANY_REQUESTS = 429
_JSON = {"Content-Type": "application/json"}
_DETAIL_CHARS = 300

Clock = Callable[[], float]
"""Seconds since the start of the run."""


class Model(BaseModel, frozen=True):
    """An entry of `/v1/models`. `vocab_size` is an extension: None where the endpoint does not tell."""

    id: str
    vocab_size: int | None = None


class ModelList(BaseModel, frozen=True):
    data: list[Model]


class RefusalDetails(BaseModel, frozen=True):
    code: str | None = None


class Refusal(BaseModel, frozen=True):
    """The body of an answer that is no completion."""

    error: RefusalDetails


@dataclass(frozen=True, slots=True)
class Params:
    """What all requests of a run have in common."""

    model: str
    temperature: float

    def body(self, token_ids: list[int], output_tokens: int) -> bytes:
        """A streamed request for exactly `output_tokens` tokens after `token_ids`."""
        fields = {
            "model": self.model,
            "prompt": token_ids,
            "temperature": self.temperature,
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(fields, separators=(",", ":")).encode()


class CompletionClient:
    """The endpoint at `url`, over `session`, which belongs to the caller."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._models_url = f"{url.rstrip('/')}/v1/models"
        self._completions_url = f"{url.rstrip('/')}/v1/completions"

    async def model(self, name: str | None) -> Model:
        """The model called `name`, or the first one. Raises EndpointError if there is none, or no answer."""
        models = await self._models()
        for model in models:
            if name in (None, model.id):
                return model
        served = ", ".join(repr(model.id) for model in models) or "none"
        raise EndpointError(f"model: {name!r} asked for, {self._models_url} serves {served}")

    async def complete(self, body: bytes, due_s: float, clock: Clock) -> RequestRecord:
        """Send `body` now and read the answer to its end. Whatever goes wrong is in the record."""
        started = RequestRecord(Outcome.FAILED, due_s=due_s, sent_s=clock(), ended_s=clock())
        try:
            record = await self._exchange(body, started, clock)
        except TimeoutError:
            record = _failed(started, "timeout", "no whole answer in time")
        except aiohttp.ClientError as error:
            record = _failed(started, type(error).__name__, str(error))
        except StreamError as error:
            record = _failed(started, error.kind, error.detail)
        return replace(record, ended_s=clock())

    async def _exchange(self, body: bytes, started: RequestRecord, clock: Clock) -> RequestRecord:
        async with self._session.post(self._completions_url, data=body, headers=_JSON) as response:
            started = replace(started, request_id=response.headers.get("X-Request-Id", ""))
            if response.status == TOO_MANY_REQUESTS:
                body = await response.read()  # to the end, so that the connection can be used again
                return replace(started, outcome=Outcome.REJECTED, rejection=_code(body))
            if not response.ok:
                return _failed(started, f"http_{response.status}", await response.text(errors="replace"))
            return await _measured(started, response.content, clock)

    async def _models(self) -> list[Model]:
        try:
            async with self._session.get(self._models_url, raise_for_status=True) as response:
                return ModelList.model_validate_json(await response.read()).data
        except TimeoutError as error:
            raise EndpointError(f"url: no answer in time from {self._models_url}") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise EndpointError(f"url: no list of models from {self._models_url}: {error}") from error


async def _measured(started: RequestRecord, content: aiohttp.StreamReader, clock: Clock) -> RequestRecord:
    stream = CompletionStream()
    async for received in content.iter_any():
        stream.feed(received, clock())
    usage, times_s = stream.finish(), stream.token_times_s
    predicted = usage.perigee_predicted
    return replace(
        started,
        outcome=Outcome.COMPLETED,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        output_tokens=usage.completion_tokens,
        ttft_s=times_s[0] - started.sent_s if times_s else None,
        tbt_s=tail_tbt_s(times_s, usage.completion_tokens),
        mean_tbt_s=mean_tbt_s(times_s, usage.completion_tokens),
        predicted_ttft_s=predicted.ttft_s if predicted else None,
        predicted_tbt_s=predicted.tbt_s if predicted else None,
    )


def _code(body: bytes) -> str:
    """What an error in OpenAI's form is called; nothing for any other."""
    try:
        return Refusal.model_validate_json(body).error.code or ""
    except ValueError:
        return ""


def _failed(started: RequestRecord, failure: str, detail: str) -> RequestRecord:
    return replace(started, outcome=Outcome.FAILED, failure=failure, detail=detail[:_DETAIL_CHARS])
