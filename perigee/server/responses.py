"""The answers of the API, in OpenAI's form. Fields that were not set are left out; null ones are there as null."""

from dataclasses import asdict
from typing import Literal

from pydantic import BaseModel

from perigee.server.generation import Tally
from perigee.server.transcript import Finish


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Predicted(BaseModel):
    """What the scheduler expected: an extension, so that load generators can tell how well it did."""

    ttft_s: float
    tbt_s: float


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    perigee_predicted: Predicted | None

    @classmethod
    def of(cls, tally: Tally) -> "Usage":
        return cls(
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=tally.completion_tokens,
            total_tokens=tally.prompt_tokens + tally.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=tally.cached_tokens),
            perigee_predicted=Predicted(**asdict(tally.prediction)) if tally.prediction else None,
        )


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class Completion(BaseModel):
    """A whole answer, or one chunk of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None


class ChatAnswer(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    vocab_size: int  # so that a load generator knows which token ids it may send


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]
