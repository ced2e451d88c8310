"""The requests of the API, checked. What is refused here never reaches a worker."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from perigee.scheduler.slo import MAX_PRIORITY, MIN_PRIORITY
from perigee.workers.engine.sequence import Sampling

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_LOGPROBS = 20
MAX_UINT32 = 2**32 - 1  # the widest that counts and token ids are on the wire

# Dividing logits by less than this overflows; what it would draw is the likeliest token anyway.
_GREEDY_BELOW = 1e-5

Prompt = str | tuple[int, ...]

# Parameters that would change the answer and are not served, each with the values that leave it as it is.
_UNSERVED: Mapping[str, tuple[object, ...]] = {
    "allowed_token_ids": (None,),
    "audio": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "modalities": (None, ["text"]),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "reasoning_effort": (None, "none"),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "skip_special_tokens": (None, True),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
}


def _stops(value: Any) -> Any:
    """One stop string, several or none, as several."""
    return () if value is None else (value,) if isinstance(value, str) else value


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """A string, strings, token ids, or lists of token ids, as a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if _is_token_ids(value):
            return (tuple(value),)
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and _is_token_ids(item) for item in value):
            return tuple(tuple(item) for item in value)
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")


def _is_token_ids(items: list[Any]) -> bool:
    # `type(...) is int` because JSON's true is no token.
    return all(type(item) is int and item >= 0 for item in items)


def _content(value: Any) -> Any:
    """Text, or parts of text one below the other."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"parts must be objects of type 'text' with a string `text`, not {kind!r}")
    return "\n".join(part["text"] for part in value)


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)


class StreamOptions(_Model):
    """`include_usage` asks for one more chunk, which counts the tokens."""

    include_usage: bool | None = None


class GenerationRequest(_Model):
    """What both endpoints take. A field that is null counts as left out; unknown fields are ignored."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_UINT32)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    n: int | None = Field(None, ge=1, le=MAX_UINT32)
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)], ...],
        Field(max_length=MAX_STOPS, strict=False),
        BeforeValidator(_stops),
    ] = ()
    stop_token_ids: Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_UINT32)], ...], Field(strict=False)] | None = None
    ignore_eos: bool | None = None
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=-MIN_PRIORITY)  # as vLLM has it: the lower, the sooner
    service_tier: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_served(self) -> "GenerationRequest":
        for field, value in (self.model_extra or {}).items():
            if field in _UNSERVED and value not in _UNSERVED[field]:
                raise _field_error(field, "this parameter is not served; leave it out", value)
        if self.stream_options is not None and not self.stream:
            raise _field_error("stream_options", "only allowed with stream: true", self.stream_options.model_dump())
        return self

    @property
    def max_tokens_field(self) -> str:
        """The field in which the client limits the output."""
        return "max_tokens"

    @property
    def output_limit(self) -> int | None:
        """Output tokens that the client allows, None if it does not say."""
        return self.max_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives to report per token, None for no log-probabilities at all."""

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int) -> Sampling:
        """How this request's tokens are drawn. Raises ValidationError if `min_tokens` is more than `max_tokens`."""
        min_tokens = self.min_tokens or 0
        if min_tokens > max_tokens:
            raise _field_error("min_tokens", f"must not be more than the output limit of {max_tokens}", min_tokens)
        return Sampling(
            temperature=_temperature(self.temperature),
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=self.stop_token_ids or (),
            logprobs=self.num_logprobs,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    @model_validator(mode="after")
    def _refuse_prompt_logprobs(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise _field_error("echo", "not served together with logprobs", self.echo)
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class Message(_Model):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]
    name: str | None = None

    @model_validator(mode="after")
    def _refuse_tool_calls(self) -> "Message":
        if (self.model_extra or {}).get("tool_calls"):
            raise PydanticCustomError("unserved", "tool_calls are not served")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: what newer clients call `developer` is their `system`."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1, strict=False)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _refuse_lone_top_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise _field_error("top_logprobs", "only allowed with logprobs: true", self.top_logprobs)
        return self

    @property
    def max_tokens_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _temperature(asked: float | None) -> float:
    if asked is None:
        return 1.0
    return 0.0 if asked < _GREEDY_BELOW else asked


def _field_error(field: str, message: str, value: object) -> ValidationError:
    """What pydantic raises for `field`, for checks that see more than one field."""
    details = InitErrorDetails(type=PydanticCustomError("refused", message), loc=(field,), input=value)
    return ValidationError.from_exception_data("request", [details])
