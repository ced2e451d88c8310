"""The openai client against a cluster that runs."""

from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from tests.e2e.endpoint import PATIENCE_S, Endpoint

QUESTION = ChatCompletionUserMessageParam(role="user", content="Where is a satellite fastest?")


@pytest.fixture
async def client(tiny: Endpoint) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as opened:
        yield opened


async def test_the_model_is_listed_with_what_a_load_generator_needs(client: AsyncOpenAI, tiny: Endpoint) -> None:
    (model,) = [model async for model in client.models.list()]
    assert model.id == tiny.model
    assert (model.model_extra or {})["vocab_size"] == tiny.vocabulary.size


async def test_a_streamed_chat_is_the_whole_one_in_pieces_with_its_usage_at_the_end(
    client: AsyncOpenAI, tiny: Endpoint
) -> None:
    whole = await client.chat.completions.create(
        model=tiny.model, messages=[QUESTION], temperature=0, max_completion_tokens=40
    )
    stream = await client.chat.completions.create(
        model=tiny.model,
        messages=[QUESTION],
        temperature=0,
        max_completion_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1


async def test_chat_logprobs_come_with_alternatives(client: AsyncOpenAI, tiny: Endpoint) -> None:
    answer = await client.chat.completions.create(
        model=tiny.model, messages=[QUESTION], temperature=0, max_completion_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    for token in logprobs.content:
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].token == token.token  # it is greedy


async def test_choices_of_one_prompt_differ_and_come_again_with_the_seed(client: AsyncOpenAI, tiny: Endpoint) -> None:
    first, second = [
        await client.completions.create(model=tiny.model, prompt="The perigee", n=2, seed=5, max_tokens=20)
        for _ in range(2)
    ]
    assert len({choice.text for choice in first.choices}) == 2
    assert [choice.text for choice in second.choices] == [choice.text for choice in first.choices]


async def test_a_stop_string_ends_the_text_before_it_and_the_work_behind_it(
    client: AsyncOpenAI, tiny: Endpoint
) -> None:
    whole = await client.completions.create(
        model=tiny.model, prompt="Half an orbit later", temperature=0, max_tokens=200, extra_body={"ignore_eos": True}
    )
    stop = whole.choices[0].text[20:26]
    answer = await client.completions.create(
        model=tiny.model,
        prompt="Half an orbit later",
        temperature=0,
        max_tokens=200,
        stop=stop,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == whole.choices[0].text.partition(stop)[0]
    await tiny.until_at_rest()
