"""A client that hangs up frees all that its request held: pages, places in the batch, leases, reservations."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.e2e.endpoint import Endpoint, Members, totals
from tests.e2e.prompts import random_prompt

MANY_TOKENS = 6000  # so many that nobody would wait for them


@pytest.fixture(autouse=True)
async def _ends_at_rest(tiny: Endpoint) -> AsyncIterator[None]:
    await tiny.until_at_rest()
    yield
    await tiny.until_at_rest()
    assert await tiny.metric("perigee_orphaned_blocks") == 0
    assert await tiny.metric("perigee_running_requests") == 0


@asynccontextmanager
async def hung_up(*requests: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    """The requests run within; at its end their clients disconnect without having read a byte."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        yield
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def output_tokens(endpoint: Endpoint) -> int:
    return sum(totals(await endpoint.until_at_rest(), "decode", "output_tokens_total"))


def is_decoding(members: Members) -> bool:
    return any(tokens > 0 for tokens in totals(members, "decode", "context_tokens"))


async def test_a_stream_whose_client_hangs_up_ends(tiny: Endpoint) -> None:
    before = await output_tokens(tiny)
    await tiny.hang_up_after(5, random_prompt(100, tiny.vocabulary.size, "hang up"), MANY_TOKENS)
    assert 5 - 1 <= await output_tokens(tiny) - before < MANY_TOKENS - 1  # the first token is prefill's


async def test_an_answer_that_nobody_waits_for_any_more_ends(tiny: Endpoint) -> None:
    before = await output_tokens(tiny)
    async with hung_up(tiny.complete(random_prompt(100, tiny.vocabulary.size, "whole"), MANY_TOKENS)):
        await tiny.until(is_decoding)
    assert await output_tokens(tiny) - before < MANY_TOKENS - 1


async def test_prompts_that_wait_for_prefill_leave_the_queue_with_their_clients(tiny: Endpoint) -> None:
    before = sum(totals(await tiny.members(), "prefill", "computed_prompt_tokens_total"))
    prompts = [random_prompt(8000 + index, tiny.vocabulary.size, "queued") for index in range(6)]
    async with hung_up(*(tiny.complete(prompt) for prompt in prompts)):
        await tiny.until(lambda members: totals(members, "prefill", "queued_prefill_tokens")[0] > 8000)
    after = sum(totals(await tiny.until_at_rest(), "prefill", "computed_prompt_tokens_total"))
    assert after - before < sum(map(len, prompts))


async def test_others_are_not_disturbed_by_those_who_hang_up(tiny: Endpoint) -> None:
    prompt = random_prompt(70, tiny.vocabulary.size, "others")
    undisturbed = await tiny.complete(prompt, 100)
    passing = [random_prompt(60 + index, tiny.vocabulary.size, "passing") for index in range(4)]
    answers, _ = await asyncio.gather(
        tiny.complete_all([prompt] * 3, 100),
        asyncio.gather(*(tiny.hang_up_after(3, each, MANY_TOKENS) for each in passing)),
    )
    assert [answer.token_ids for answer in answers] == [undisturbed.token_ids] * 3
