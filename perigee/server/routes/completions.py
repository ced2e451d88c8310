"""POST /v1/completions."""

import time
from collections.abc import Iterable, Sequence
from functools import partial

from perigee.server.gateway import Gateway
from perigee.server.generation import Choice, Tally
from perigee.server.intake import Call
from perigee.server.job import Prompt
from perigee.server.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from perigee.server.routes.generate import GenerateEndpoint
from perigee.server.schema import CompletionRequest
from perigee.server.schema import Prompt as RequestPrompt
from perigee.server.transcript import Piece, PlacedToken
from perigee.workers.model.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionsEndpoint(GenerateEndpoint[CompletionRequest]):
    path = "/v1/completions"

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway, CompletionRequest)

    async def choices(self, call: Call[CompletionRequest]) -> Sequence[Sequence[Choice]]:
        prompts = [await self._prompt(call, prompt) for prompt in call.request.prompt]
        echoes = [self._echo(prompt) if call.request.echo else "" for prompt in call.request.prompt]
        return call.choices(prompts, _DEFAULT_MAX_TOKENS, echoes)

    def form(self, call: Call[CompletionRequest]) -> "CompletionForm":
        return CompletionForm(call)

    async def _prompt(self, call: Call[CompletionRequest], prompt: RequestPrompt) -> Prompt:
        if isinstance(prompt, str):
            encode = partial(self._gateway.tokenizer.encode, prompt)
            return await call.prompt(encode, len(prompt), "prompt")
        return await call.prompt(lambda: prompt, len(prompt), "prompt")

    def _echo(self, prompt: RequestPrompt) -> str:
        return prompt if isinstance(prompt, str) else self._gateway.tokenizer.decode(prompt)


class CompletionForm:
    """OpenAI's `text_completion`, which looks the same streamed and whole."""

    def __init__(self, call: Call[CompletionRequest]) -> None:
        self._id = call.request_id
        self._created = int(time.time())
        self._model = call.request.model
        self._tokenizer = call.gateway.tokenizer
        self._with_logprobs = call.request.logprobs is not None
        self._include_usage = call.request.include_usage

    def chunks(self, piece: Piece) -> Iterable[Completion]:
        chunk = self._completion([self._choice(piece.choice, [piece])])
        if self._include_usage:
            chunk.usage = None  # said to be null until the last chunk
        return (chunk,)

    def usage_chunk(self, tally: Tally) -> Completion:
        chunk = self._completion([])
        chunk.usage = Usage.of(tally)
        return chunk

    def whole(self, pieces: Iterable[Piece], tally: Tally) -> Completion:
        choices: dict[int, list[Piece]] = {}
        for piece in pieces:
            choices.setdefault(piece.choice, []).append(piece)
        whole = self._completion([self._choice(index, choices[index]) for index in sorted(choices)])
        whole.usage = Usage.of(tally)
        return whole

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._id, object="text_completion", created=self._created, model=self._model, choices=choices
        )

    def _choice(self, index: int, pieces: Sequence[Piece]) -> CompletionChoice:
        tokens = [placed for piece in pieces for placed in piece.tokens]
        return CompletionChoice(
            index=index,
            text="".join(piece.text for piece in pieces),
            logprobs=self._logprobs(tokens) if self._with_logprobs else None,
            finish_reason=pieces[-1].finish_reason,
        )

    def _logprobs(self, tokens: Sequence[PlacedToken]) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[token_text(self._tokenizer, placed.token.token) for placed in tokens],
            token_logprobs=[placed.token.logprob for placed in tokens],
            top_logprobs=[self._top(placed) for placed in tokens],
            text_offset=[placed.offset for placed in tokens],
        )

    def _top(self, placed: PlacedToken) -> dict[str, float]:
        """The likeliest tokens and the one drawn, by text."""
        top = {token_text(self._tokenizer, token): logprob for token, logprob in placed.token.top_logprobs}
        if placed.token.logprob is not None:
            top.setdefault(token_text(self._tokenizer, placed.token.token), placed.token.logprob)
        return top


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; one that is not whole characters as its bytes, in the form `bytes:\\xe4\\xb8`."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
