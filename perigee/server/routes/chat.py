"""POST /v1/chat/completions."""

import time
from collections.abc import Iterable, Sequence
from functools import partial

from perigee.server.errors import InvalidRequest
from perigee.server.gateway import Gateway
from perigee.server.generation import Choice, Tally
from perigee.server.intake import Call
from perigee.server.responses import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatTokenLogprob,
    TopLogprob,
    Usage,
)
from perigee.server.routes.generate import GenerateEndpoint
from perigee.server.schema import ChatRequest
from perigee.server.transcript import Piece, PlacedToken
from perigee.workers.model.tokenizer import Tokenizer, TokenizerError


class ChatEndpoint(GenerateEndpoint[ChatRequest]):
    path = "/v1/chat/completions"

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway, ChatRequest)

    async def choices(self, call: Call[ChatRequest]) -> Sequence[Sequence[Choice]]:
        messages = [message.for_template() for message in call.request.messages]
        encode = partial(self._gateway.tokenizer.apply_chat_template, messages)
        try:
            prompt = await call.prompt(encode, sum(len(message["content"]) for message in messages), "messages")
        except TokenizerError as error:
            raise InvalidRequest(f"messages: {error}", param="messages") from None
        return call.choices([prompt], self._gateway.config.default_max_tokens, [""])

    def form(self, call: Call[ChatRequest]) -> "ChatForm":
        return ChatForm(call)


class ChatForm:
    """OpenAI's `chat.completion`, and `chat.completion.chunk` for streams."""

    def __init__(self, call: Call[ChatRequest]) -> None:
        self._id = call.request_id
        self._created = int(time.time())
        self._model = call.request.model
        self._tokenizer = call.gateway.tokenizer
        self._with_logprobs = bool(call.request.logprobs)
        self._include_usage = call.request.include_usage
        self._begun: set[int] = set()  # choices whose role was told

    def chunks(self, piece: Piece) -> Iterable[ChatChunk]:
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            role = ChatDelta(role="assistant", content="")
            yield self._chunk([ChatChunkChoice(index=piece.choice, delta=role, logprobs=None, finish_reason=None)])
        yield self._chunk(
            [
                ChatChunkChoice(
                    index=piece.choice,
                    delta=ChatDelta(content=piece.text),
                    logprobs=self._logprobs(piece.tokens),
                    finish_reason=piece.finish_reason,
                )
            ]
        )

    def usage_chunk(self, tally: Tally) -> ChatChunk:
        chunk = self._chunk([])
        chunk.usage = Usage.of(tally)
        return chunk

    def whole(self, pieces: Iterable[Piece], tally: Tally) -> ChatCompletion:
        choices: dict[int, list[Piece]] = {}
        for piece in pieces:
            choices.setdefault(piece.choice, []).append(piece)
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[self._choice(index, choices[index]) for index in sorted(choices)],
            usage=Usage.of(tally),
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        chunk = ChatChunk(
            id=self._id, object="chat.completion.chunk", created=self._created, model=self._model, choices=choices
        )
        if self._include_usage:
            chunk.usage = None  # said to be null until the last chunk
        return chunk

    def _choice(self, index: int, pieces: Sequence[Piece]) -> ChatChoice:
        text = "".join(piece.text for piece in pieces)
        return ChatChoice(
            index=index,
            message=ChatAnswer(role="assistant", content=text, refusal=None),
            logprobs=self._logprobs([placed for piece in pieces for placed in piece.tokens]),
            finish_reason=pieces[-1].finish_reason,
        )

    def _logprobs(self, tokens: Sequence[PlacedToken]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return ChatLogprobs(content=[self._token(placed) for placed in tokens], refusal=None)

    def _token(self, placed: PlacedToken) -> ChatTokenLogprob:
        token = placed.token
        drawn = _top(self._tokenizer, token.token, token.logprob or 0.0)
        top = [_top(self._tokenizer, other, logprob) for other, logprob in token.top_logprobs]
        return ChatTokenLogprob(token=drawn.token, logprob=drawn.logprob, bytes=drawn.bytes, top_logprobs=top)


def _top(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    data = tokenizer.token_bytes(token_id)
    return TopLogprob(token=data.decode(errors="replace"), logprob=logprob, bytes=list(data))
