"""More than the cluster can take is turned away at once, and what was let in is served."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest

from tests.e2e.conftest import up
from tests.e2e.endpoint import Answer, Endpoint, Refusal, Vocabulary, totals
from tests.e2e.prompts import random_prompt

KV_TOKENS = 2048
MAX_SEQUENCES = 4


@pytest.fixture(scope="module")
def small(tiny_llama: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A cluster with room for little."""
    flags = (f"--kv-tokens={KV_TOKENS}", f"--max-sequences={MAX_SEQUENCES}", "--dram-bytes=32MiB")
    with up(tmp_path_factory.mktemp("small"), tiny_llama, vocabulary, *flags) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def at_decode(tiny_llama: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A cluster that asks about decode when a prompt is computed, and can promise something that nobody can keep."""
    flags = ("--admission=at-decode", "--slo-classes=strict=-:0.000001,batch=-:-")
    with up(tmp_path_factory.mktemp("at-decode"), tiny_llama, vocabulary, *flags) as endpoint:
        yield endpoint


async def test_a_burst_is_partly_turned_away_and_none_of_it_fails(small: Endpoint) -> None:
    prompts = [random_prompt(200 + index, small.vocabulary.size, "burst") for index in range(30)]
    outcomes = await asyncio.gather(*(small.try_complete(prompt, 150) for prompt in prompts))
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    refusals = [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
    assert len(answers) >= MAX_SEQUENCES
    assert {len(answer.token_ids) for answer in answers} == {150}
    assert refusals
    assert {refusal.status for refusal in refusals} == {429}
    assert all(int(refusal.retry_after or 0) >= 1 for refusal in refusals)
    assert {refusal.error["type"] for refusal in refusals} == {"rate_limit_error"}


async def test_at_decode_a_prompt_is_computed_in_vain_and_its_client_gets_no_byte_of_an_answer(
    at_decode: Endpoint,
) -> None:
    prompt = random_prompt(100, at_decode.vocabulary.size, "in vain")
    refusal = await at_decode.try_complete(prompt, 8, service_tier="strict", stream=True)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.error["code"]) == (429, "overloaded")
    members = await at_decode.until_at_rest()
    assert totals(members, "prefill", "computed_prompt_tokens_total") == [100]
    assert totals(members, "decode", "output_tokens_total") == [0]
    assert (await at_decode.complete(prompt, 8)).cached_tokens == 99


async def test_after_a_burst_everything_works(small: Endpoint) -> None:
    prompts = [random_prompt(100 + index, small.vocabulary.size, "after") for index in range(MAX_SEQUENCES)]
    await asyncio.gather(*(small.try_complete(prompt) for prompt in prompts * 5))
    await small.until_at_rest()
    answers = await small.complete_all(prompts)
    assert {len(answer.token_ids) for answer in answers} == {16}
    await small.until_at_rest()
    assert await small.metric("perigee_orphaned_blocks") == 0


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "field"),
    [
        (8192, 1, "prompt"),  # the context
        (1000, 8000, "max_tokens"),  # the context, with what is asked for
        (1000, 2000, "prompt"),  # no worker's pages are enough
        (4000, 1, "prompt"),  # nor for the prompt alone
    ],
)
async def test_what_could_never_be_served_is_refused_for_good(
    small: Endpoint, prompt_tokens: int, max_tokens: int, field: str
) -> None:
    prompt = random_prompt(prompt_tokens, small.vocabulary.size, "too large")
    refusal = await small.try_complete(prompt, max_tokens)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.retry_after) == (400, None)
    assert refusal.error["code"] == "context_length_exceeded"
    assert refusal.error["param"] == field


async def test_a_sequence_that_takes_all_pages_is_served(small: Endpoint) -> None:
    await small.until_at_rest()
    prompt = random_prompt(KV_TOKENS - 40, small.vocabulary.size, "all pages")
    assert len((await small.complete(prompt, 40)).token_ids) == 40


async def alone(endpoint: Endpoint, prompt: list[int]) -> Answer:
    """One that takes nearly all of a worker's pages: those of the request before it must be free, and known to be."""
    await endpoint.until_at_rest()
    return await endpoint.complete(prompt, 4)


async def test_the_cache_gives_way_when_it_is_full_and_outputs_stay_the_same(small: Endpoint) -> None:
    prompts = [random_prompt(KV_TOKENS - 100, small.vocabulary.size, f"filling {index}") for index in range(10)]
    first = [await alone(small, prompt) for prompt in prompts]
    members = await small.until_at_rest()
    assert members["store-0"].load["evicted_total"] > 0
    again = [await alone(small, prompt) for prompt in prompts]
    assert min(answer.cached_tokens for answer in again) < KV_TOKENS - 101, "they cannot all be there"
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in first]


async def test_where_little_room_is_left_it_is_for_higher_priorities(small: Endpoint) -> None:
    await small.until_at_rest()
    async with AsyncExitStack() as stack:
        prompts = [random_prompt(40, small.vocabulary.size, f"running {index}") for index in range(MAX_SEQUENCES - 1)]
        # So long that they go on until the others have been asked.
        running = [await stack.enter_async_context(aclosing(small.stream(prompt, 560))) for prompt in prompts]
        await asyncio.gather(*(anext(tokens) for tokens in running))
        prompt = random_prompt(40, small.vocabulary.size, "next")
        low = await small.try_complete(prompt, 4, priority=5)
        high = await small.try_complete(prompt, 4, priority=-5)
    assert isinstance(low, Refusal)
    assert (low.status, low.error["code"]) == (429, "overloaded")
    assert 1 <= int(low.retry_after or 0) <= 60
    assert low.error["predicted_ttft_s"] > 0
    assert isinstance(high, Answer)
