"""From a checked request to the choices that are to be made."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import ValidationError

from perigee.scheduler import scheduler_pb2 as pb
from perigee.server.errors import ContextLengthExceeded, InvalidRequest, from_validation
from perigee.server.gateway import Gateway
from perigee.server.generation import Choice
from perigee.server.job import Job, Prompt, prompt_keys
from perigee.server.schema import GenerationRequest
from perigee.server.tenants import Tenant
from perigee.server.transcript import Transcript
from perigee.server.urgency import Urgency, urgency_of
from perigee.workers.engine.sequence import Sampling
from perigee.workers.messages import ModelCard

R = TypeVar("R", bound=GenerationRequest)

# Tokenizing takes a few microseconds a character; more than this is done beside the event loop.
_LARGE_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """One request under way. `arrived_s` is of the monotonic clock."""

    request_id: str
    arrived_s: float
    tenant: Tenant
    request: R
    card: ModelCard
    gateway: Gateway

    async def prompt(self, encode: Callable[[], Sequence[int]], size: int, field: str) -> Prompt:
        """What `encode` makes of the field that holds the prompt, about `size` characters. Raises InvalidRequest."""
        if size > _LARGE_CHARACTERS:
            return await asyncio.to_thread(self._encode, encode, field)
        return self._encode(encode, field)

    def choices(self, prompts: Sequence[Prompt], default_max_tokens: int, echoes: Sequence[str]) -> list[list[Choice]]:
        """`n` choices for each prompt. Raises InvalidRequest."""
        n = self.request.n or 1
        most = self.gateway.config.max_choices
        if n * len(prompts) > most:
            text = f"n: {n} choices for {len(prompts)} prompts are {n * len(prompts)}; allowed are {most} in all"
            raise InvalidRequest(text, param="n")
        _check_tokens(self.request.stop_token_ids or (), self.card, "stop_token_ids")
        seed = secrets.randbits(64) if self.request.seed is None else self.request.seed % 2**64
        config = self.gateway.config
        urgency = urgency_of(self.tenant, self.request.priority, self.request.service_tier, config)
        samplings = [self._sampling(prompt, default_max_tokens) for prompt in prompts]
        return [
            [self._choice(index * n + j, j, prompt, sampling, seed, echo, urgency) for j in range(n)]
            for index, (prompt, sampling, echo) in enumerate(zip(prompts, samplings, echoes, strict=True))
        ]

    def _encode(self, encode: Callable[[], Sequence[int]], field: str) -> Prompt:
        token_ids = tuple(encode())
        _check_prompt(token_ids, self.card, field)  # first: keys can only be made of what fits the wire
        return Prompt(field, token_ids, prompt_keys(self.card, token_ids, self.tenant.salt))

    def _sampling(self, prompt: Prompt, default_max_tokens: int) -> Sampling:
        try:
            return self.request.sampling(self._max_tokens(len(prompt.token_ids), default_max_tokens))
        except ValidationError as error:
            raise from_validation(error) from None

    def _max_tokens(self, prompt_len: int, default: int) -> int:
        """A limit that was asked for must fit the context; the default takes what there is."""
        asked = self.request.output_limit
        if asked is None:
            return max(1, min(default, _room(self.card, self.gateway.conductor.state) - prompt_len))
        if prompt_len + asked > self.card.max_context:
            field = self.request.max_tokens_field
            raise ContextLengthExceeded(
                f"{field}: {asked} after a prompt of {prompt_len} tokens is more than the model's context of "
                f"{self.card.max_context} tokens; allowed are up to {self.card.max_context - prompt_len}",
                param=field,
            )
        return asked

    def _choice(
        self, index: int, draw: int, prompt: Prompt, sampling: Sampling, seed: int, echo: str, urgency: Urgency
    ) -> Choice:
        job = Job(
            request_id=self.request_id,
            choice=index,
            draw=draw,
            prompt=prompt,
            sampling=sampling,
            seed=seed,
            card=self.card,
            salt=self.tenant.salt,
            arrived_s=self.arrived_s,
            deadline_s=time.time() + self.gateway.config.request_timeout_s,
            tenant=self.tenant.name,
            priority=urgency.priority,
            slo=urgency.slo,
        )
        transcript = Transcript(index, self.gateway.tokenizer, prompt.token_ids, self.request.stop, sampling.min_tokens)
        return Choice(job, transcript, echo)


def _check_prompt(token_ids: Sequence[int], card: ModelCard, field: str) -> None:
    if not token_ids:
        raise InvalidRequest(f"{field}: has no tokens; at least one is needed", param=field)
    if len(token_ids) >= card.max_context:
        raise ContextLengthExceeded(
            f"{field}: has {len(token_ids)} tokens; allowed are up to {card.max_context - 1}, as the model's context "
            f"is {card.max_context} tokens and the answer needs one at least",
            param=field,
        )
    _check_tokens(token_ids, card, field)


def _check_tokens(token_ids: Sequence[int], card: ModelCard, field: str) -> None:
    if (largest := max(token_ids, default=0)) >= card.vocab_size:
        raise InvalidRequest(
            f"{field}: there is no token {largest}; allowed are 0 to {card.vocab_size - 1}", param=field
        )


def _room(card: ModelCard, state: pb.ClusterState | None) -> int:
    """The longest sequence that some decode worker can hold: a page holds one block."""
    workers = state.workers if state is not None else ()
    pages = [worker.report.total_pages for worker in workers if worker.report.role != "prefill"]
    return min([card.max_context, *([max(pages) * card.block_tokens] if any(pages) else [])])
