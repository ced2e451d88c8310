"""/v1/chat/completions through the `openai` client."""

from openai import AsyncOpenAI

from tests.server.conftest import Cluster


async def test_answers_in_the_assistants_name(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world", eos=True)
    answer = await client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "hello"}, {"role": "user", "content": "the fox"}]
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "hello world"
    assert answer.choices[0].finish_reason == "stop"
    prompt = front.prefill.said("start")[0].sequence.token_ids
    assert front.tokenizer.decode(prompt, skip_special_tokens=False) == (
        "<|im_start|>system\nhello<|im_end|>\n<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_streams_the_role_first_then_the_text(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world", eos=True)
    stream = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "hello world"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens_details is not None
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_parts_of_text_and_developer_messages_are_understood(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("a")
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "fox"}]
    await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts}],  # type: ignore[list-item,misc]
        max_completion_tokens=1,
    )
    prompt = front.tokenizer.decode(front.prefill.said("start")[0].sequence.token_ids, skip_special_tokens=False)
    assert "<|im_start|>system\nx" in prompt and "user\nthe\nfox<|im_end|>" in prompt


async def test_default_output_limit_is_what_the_workers_can_hold(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("a" * 300)
    answer = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    assert answer.usage is not None
    assert answer.usage.total_tokens == front.card.max_context


async def test_logprobs_carry_each_tokens_bytes(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("né 世", eos=True)
    answer = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    entries = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes or []) for entry in entries).decode() == "né 世"
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in entries)
    assert front.prefill.said("start")[0].sequence.sampling.logprobs == 2


async def test_choices_of_a_stream_are_told_apart_by_index(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world", eos=True)
    stream = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], n=2, stream=True
    )
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["hello world", "hello world"]
