"""All choices of one request, running side by side into one stream of pieces."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from perigee.server.closing import Closing
from perigee.server.dispatch import Dispatcher
from perigee.server.errors import ApiError
from perigee.server.job import Job, Prediction
from perigee.server.transcript import Piece, Transcript
from perigee.workers.engine.sequence import FinishReason, Token


@dataclass(slots=True)
class Tally:
    """Counts the tokens of a request. Owned by its `Generation`, which alone adds to it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    prediction: Prediction | None = None  # of the choice that was admitted first


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice to be made, where its text goes, and what is put before its text."""

    job: Job
    transcript: Transcript
    echo: str = ""


class Generation:
    """The answer to one request as it comes into being. Iterate `pieces`; read `tally` any time."""

    def __init__(self, dispatcher: Dispatcher, closing: Closing, prompts: Sequence[Sequence[Choice]]) -> None:
        """`prompts` holds the choices of each prompt."""
        self.tally = Tally(prompt_tokens=sum(len(choices[0].job.prompt.token_ids) for choices in prompts))
        self._dispatcher = dispatcher
        self._closing = closing
        self._prompts = prompts
        self._admitted = asyncio.Event()  # a choice was, so the client may have heard of the request
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Generation"]:
        """Runs all choices until they are done or the context is left, which cancels those that still run."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: self._pieces.put_nowait(None))
        try:
            yield self
        finally:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Raises ApiError if a choice failed; the others are cancelled then."""
        while (piece := await self._pieces.get()) is not None:
            yield piece
        self._task.result()

    async def _run(self) -> None:
        try:
            async with self._closing.guarded():
                await self._run_prompts(*self._prompts)
        except BaseExceptionGroup as failures:
            raise _first(failures) from failures

    async def _run_prompts(self, first: Sequence[Choice], *others: Sequence[Choice]) -> None:
        """The first choice of all goes ahead: once it is admitted, the others wait for room as long as it takes."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run_prompt(first))
            await self._admitted.wait()
            for choices in others:
                group.create_task(self._run_prompt(choices))

    async def _run_prompt(self, choices: Sequence[Choice]) -> None:
        """The first choice computes the prompt; the others wait for its blocks and start from them."""
        prefilled = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run_choice(choices[0], prefilled))
            await prefilled.wait()
            for choice in choices[1:]:
                group.create_task(self._run_choice(choice))

    async def _run_choice(self, choice: Choice, prefilled: asyncio.Event | None = None) -> None:
        await self._dispatcher.run(choice.job, _Sink(self, choice, prefilled), self._admitted)

    def admit(self, cached_tokens: int, prediction: Prediction) -> None:
        """Called by a choice's sink, with the tokens that the choice found cached in its prompt."""
        self._admitted.set()
        self.tally.cached_tokens += cached_tokens
        self.tally.prediction = self.tally.prediction or prediction

    def take(self, choice: Choice, token: Token, reason: FinishReason) -> bool:
        """Called by a choice's sink."""
        first = choice.transcript.num_tokens == 0
        piece = choice.transcript.feed(token, reason)
        self.tally.completion_tokens += 1
        self._pieces.put_nowait(replace(piece, text=choice.echo + piece.text) if first and choice.echo else piece)
        return piece.finish_reason is not None


class _Sink:
    """Where the dispatcher puts one choice's tokens. The one that computes the prompt tells when that is done."""

    def __init__(self, generation: Generation, choice: Choice, prefilled: asyncio.Event | None = None) -> None:
        self._generation = generation
        self._choice = choice
        self._prefilled = prefilled

    def admitted(self, cached_tokens: int, prediction: Prediction) -> None:
        if self._prefilled is not None:
            self._generation.admit(cached_tokens, prediction)
            self._prefilled.set()

    def feed(self, token: Token, reason: FinishReason) -> bool:
        return self._generation.take(self._choice, token, reason)


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """What to tell the client, who asked one thing: an error of the API, else whatever it was."""
    leaves = list(_leaves(failures))
    return next((leaf for leaf in leaves if isinstance(leaf, ApiError)), leaves[0])


def _leaves(failures: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    nested = (_leaves(each) if isinstance(each, BaseExceptionGroup) else [each] for each in failures.exceptions)
    return [leaf for leaves in nested for leaf in leaves]
