"""What the end-to-end tests ask of a cluster that runs: completions by token ids, and how it is doing."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from perigee.server.routes.completions import token_text
from perigee.workers.model.tokenizer import Tokenizer

# The longest that anything here is waited for. It is no measure of how long it should take.
PATIENCE_S = 120.0
_REPORTS_S = 0.6  # by then whoever did something has reported it
_POLL_S = 0.05

Prompt = Sequence[int]


class Vocabulary:
    """Which token is meant by a text that `logprobs` reports: no two have the same."""

    def __init__(self, directory: Path) -> None:
        tokenizer = Tokenizer.load(directory)
        self.size = tokenizer.vocab_size
        self.encode: Callable[[str], Sequence[int]] = tokenizer.encode
        self._ids = {token_text(tokenizer, token): token for token in range(self.size)}
        assert len(self._ids) == self.size

    def ids(self, texts: Iterable[str]) -> list[int]:
        return [self._ids[text] for text in texts]


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion: its tokens with their log-probabilities, and how many prompt tokens came from the cache."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """A completion that was turned away."""

    status: int
    error: Mapping[str, Any]
    retry_after: str | None


@dataclass(frozen=True, slots=True)
class Member:
    """A worker or store node, as GET /cluster tells of it."""

    id: str
    role: str
    pid: int
    load: Mapping[str, Any]
    draining: bool = False  # about to end

    @property
    def is_at_rest(self) -> bool:
        """Whether no sequence is there, no page is taken, and no block is leased, reserved or orphaned.

        Who has not answered in time, or not reported yet, shows nothing but zeros, and is not known to be at rest.
        """
        load = self.load
        if self.role == "store":
            busy = load["leased_blocks"] + load["reserved_blocks"] + load["orphaned_blocks"]
            return not busy and load["num_slots"] > 0
        sequences = load["running_sequences"] + load["queued_sequences"]
        return not sequences and 0 < load["total_pages"] == load["free_pages"]


Members = Mapping[str, Member]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A cluster's API. Completions are greedy and as long as `max_tokens` says, unless `fields` say otherwise."""

    url: str
    model: str
    vocabulary: Vocabulary

    async def complete(self, prompt: Prompt, max_tokens: int = 16, **fields: Any) -> Answer:
        """Raises AssertionError if it is refused."""
        answer = await self.try_complete(prompt, max_tokens, **fields)
        assert isinstance(answer, Answer), answer
        return answer

    async def complete_all(self, prompts: Iterable[Prompt], max_tokens: int = 16, **fields: Any) -> list[Answer]:
        """All at once."""
        return await asyncio.gather(*(self.complete(prompt, max_tokens, **fields) for prompt in prompts))

    async def try_complete(self, prompt: Prompt, max_tokens: int = 16, **fields: Any) -> Answer | Refusal:
        async with self._post(prompt, max_tokens, fields) as response:
            body = await response.json()
            if response.status == 200:
                return self._answer(body)
            return Refusal(response.status, body["error"], response.headers.get("retry-after"))

    async def stream(self, prompt: Prompt, max_tokens: int, **fields: Any) -> AsyncGenerator[int, None]:
        """The tokens as they come. To close the iterator is to hang up."""
        async with self._post(prompt, max_tokens, {"stream": True, **fields}) as response:
            assert response.status == 200
            async for line in response.content:
                if line.startswith(b"data: {"):
                    (choice,) = json.loads(line.removeprefix(b"data: "))["choices"]
                    for token in self.vocabulary.ids(choice["logprobs"]["tokens"]):
                        yield token

    async def hang_up_after(self, num_tokens: int, prompt: Prompt, max_tokens: int) -> None:
        """Disconnects in the midst of a stream."""
        async with aclosing(self.stream(prompt, max_tokens)) as tokens:
            for _ in range(num_tokens):
                await anext(tokens)

    async def members(self) -> Members:
        """Workers and store nodes by id."""
        async with _session() as http, http.get(f"{self.url}/cluster") as response:
            state = await response.json()
        entries = (*state["workers"], *state["stores"])
        return {e["id"]: Member(e["id"], e["role"], e["pid"], e["load"], e.get("draining", False)) for e in entries}

    async def until(self, condition: Callable[[Members], object]) -> Members:
        """Polls the cluster until `condition` holds for its members, and returns them. Raises TimeoutError."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition(members := await self.members()):  # noqa: ASYNC110  # other processes have no event
                await asyncio.sleep(_POLL_S)
        return members

    async def until_at_rest(self) -> Members:
        """Waits until nobody holds pages, leases or reservations, by reports that are from after the call."""
        await asyncio.sleep(_REPORTS_S)
        return await self.until(lambda members: all(member.is_at_rest for member in members.values()))

    async def metric(self, name: str, **labels: str) -> float:
        """The samples of /metrics with this name and these labels, added up."""
        async with _session() as http, http.get(f"{self.url}/metrics") as response:
            families = list(text_string_to_metric_families(await response.text()))
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if sample.labels.items() >= labels.items())

    @asynccontextmanager
    async def _post(
        self, prompt: Prompt, max_tokens: int, fields: Mapping[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            **fields,
        }
        async with _session() as http, http.post(f"{self.url}/v1/completions", json=body) as response:
            yield response

    def _answer(self, body: dict[str, Any]) -> Answer:
        (choice,) = body["choices"]
        return Answer(
            token_ids=self.vocabulary.ids(choice["logprobs"]["tokens"]),
            logprobs=choice["logprobs"]["token_logprobs"],
            finish_reason=choice["finish_reason"],
            cached_tokens=body["usage"]["prompt_tokens_details"]["cached_tokens"],
        )


def totals(members: Members, role: str, field: str) -> list[int]:
    """A counter of each worker of a role, in the order of their ids."""
    return [members[name].load[field] for name in sorted(members) if members[name].role == role]


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE_S))
