"""/v1/completions through the `openai` client."""

import pytest
from openai import AsyncOpenAI

from perigee.kvstore.blocks import chain
from perigee.workers.wire import sequence_from_pb
from tests.server.conftest import Cluster


async def test_answers_with_the_workers_text_and_counts_tokens(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world", eos=True)
    front.prefill.cached = (4, 0, 0)
    answer = await client.completions.create(model="tiny", prompt="the quick brown fox", max_tokens=50)
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text == "hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens == len(front.tokenizer.encode("the quick brown fox"))
    assert answer.usage.completion_tokens == len(front.tokenizer.encode("hello world")) + 1
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


async def test_usage_tells_what_the_scheduler_expected(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world", eos=True)
    front.conductor.predicts = (0.25, 0.0625)
    answer = await client.completions.create(model="tiny", prompt="the quick brown fox", max_tokens=50)
    assert answer.usage is not None and answer.usage.model_extra is not None
    assert answer.usage.model_extra["perigee_predicted"] == {"ttft_s": 0.25, "tbt_s": 0.0625}


async def test_streams_one_chunk_per_token(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world over")
    tokens = front.tokenizer.encode("hello world over")
    stream = await client.completions.create(model="tiny", prompt="x", max_tokens=len(tokens), stream=True)
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks] == [front.tokenizer.decode([token]) for token in tokens]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(tokens) - 1) + ["length"]
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


async def test_include_usage_adds_a_last_chunk_and_null_before(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world")
    stream = await client.completions.create(
        model="tiny", prompt="x", max_tokens=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 2
    assert chunks[-1].usage.prompt_tokens_details is not None


async def test_prefill_starts_and_decode_goes_on_with_the_same_sequence(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world over")
    await client.completions.create(
        model="tiny", prompt=[1, 2, 3, 4, 5], max_tokens=3, temperature=0.5, top_p=0.9, seed=-1,
        extra_body={"top_k": 7, "ignore_eos": True, "min_tokens": 2, "stop_token_ids": [9]},
    )  # fmt: skip
    first, second = (sequence_from_pb(worker.said("start")[0].sequence) for worker in (front.prefill, front.decode))
    prepared = sequence_from_pb(front.decode.said("prepare")[0].sequence)
    assert first == prepared
    assert first.token_ids == (1, 2, 3, 4, 5)
    assert second.token_ids == (*first.token_ids, front.tokenizer.encode("hello world over")[0])
    assert (second.ref, second.prompt_len, second.seed) == (first.ref, 5, 2**64 - 1)
    assert list(second.block_keys) == chain(front.card.namespace, second.token_ids, front.card.block_tokens)
    sampling = first.sampling
    assert (sampling.top_k, sampling.ignore_eos, sampling.min_tokens, sampling.stop_token_ids) == (7, True, 2, (9,))
    assert (sampling.temperature, sampling.max_tokens) == (0.5, 3)
    await front.prefill.hears("joined")
    assert not front.prefill.said("cancel") and not front.decode.said("cancel")


async def test_one_token_needs_no_decode(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello")
    await client.completions.create(model="tiny", prompt="x", max_tokens=1)
    await front.conductor.hears("finished")
    assert front.decode.heard.items == []


async def test_an_answer_that_ends_with_the_first_token_frees_both_workers(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("", eos=True)
    answer = await client.completions.create(model="tiny", prompt="x", max_tokens=9)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    await front.prefill.hears("cancel")
    await front.decode.hears("cancel")
    await front.conductor.hears("finished")


async def test_a_mixed_worker_does_both_phases_on_one_start(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world", eos=True)
    front.prefill.role = "mixed"
    front.conductor.decode = front.prefill
    answer = await client.completions.create(model="tiny", prompt="x", max_tokens=50)
    assert answer.choices[0].text == "hello world"
    assert [message.WhichOneof("message") for message in front.prefill.heard.items] == ["start"]


async def test_every_prompt_and_choice_gets_its_own_sequence(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello")
    answer = await client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=1, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None and answer.usage.prompt_tokens == 2 and answer.usage.completion_tokens == 4
    works = sorted((sequence_from_pb(start.sequence) for start in front.prefill.said("start")), key=lambda w: w.ref)
    texts = [front.tokenizer.decode(work.token_ids) for work in works]
    assert texts == ["a", "a", "b", "b"]
    assert {work.seed for work in works} == {5}
    assert {work.ref.request_id for work in works} == {answer.id}


async def test_a_prompts_draws_do_not_depend_on_the_other_prompts(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello")
    await client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=1, seed=5)
    works = sorted((sequence_from_pb(start.sequence) for start in front.prefill.said("start")), key=lambda w: w.ref)
    assert [(work.ref.choice, work.draw) for work in works] == [(0, 0), (1, 1), (2, 0), (3, 1)]


async def test_further_choices_wait_for_the_first_ones_prefill(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world")
    order: list[tuple[str, int]] = []
    await client.completions.create(model="tiny", prompt="a", n=3, max_tokens=2)
    for event in front.conductor.heard.items:
        order.append((event.WhichOneof("event"), event.ref.choice))
    assert order[0] == ("arrived", 0)
    assert order.index(("prefill_done", 0)) < order.index(("arrived", 1)) < order.index(("arrived", 2))


async def test_echo_puts_the_prompt_before_the_text(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello")
    answer = await client.completions.create(model="tiny", prompt="the fox ", max_tokens=1, echo=True)
    assert answer.choices[0].text.startswith("the fox ")


async def test_default_output_limit_is_16_and_clamped_to_the_context(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("a" * 100)
    await client.completions.create(model="tiny", prompt="x")
    await client.completions.create(model="tiny", prompt=[5] * (front.card.max_context - 3))
    limits = [start.sequence.sampling.max_tokens for start in front.prefill.said("start")]
    assert limits == [16, 3]


async def test_logprobs_lie_beside_their_tokens(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world", eos=True)
    answer = await client.completions.create(model="tiny", prompt="x", max_tokens=50, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.text_offset and logprobs.top_logprobs
    assert "".join(logprobs.tokens) == "hello world"
    assert logprobs.token_logprobs == [-0.5] * len(logprobs.tokens)
    assert [answer.choices[0].text[offset:][:1] for offset in logprobs.text_offset] == [t[0] for t in logprobs.tokens]
    assert logprobs.top_logprobs[0] == {logprobs.tokens[0]: -0.5, "<|endoftext|>": -2.0}
    assert front.prefill.said("start")[0].sequence.sampling.logprobs == 2


async def test_streamed_logprobs_are_those_of_the_whole_answer(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("héllo 世界 world", eos=True)
    whole = await client.completions.create(model="tiny", prompt="x", max_tokens=50, logprobs=0)
    stream = await client.completions.create(model="tiny", prompt="x", max_tokens=50, logprobs=0, stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    expected = whole.choices[0].logprobs
    assert expected is not None
    assert [token for chunk in chunks for token in chunk.logprobs.tokens] == expected.tokens
    assert [offset for chunk in chunks for offset in chunk.logprobs.text_offset] == expected.text_offset


async def test_no_chunk_ends_inside_a_character(front: Cluster, client: AsyncOpenAI) -> None:
    text = "ein Gruß aus 東京 🛰️!"
    front.answers(text, eos=True)
    stream = await client.completions.create(model="tiny", prompt="x", max_tokens=200, stream=True)
    texts = [chunk.choices[0].text async for chunk in stream]
    assert "".join(texts) == text
    assert not any("\ufffd" in text for text in texts)


@pytest.mark.parametrize("stop", ["wor", ["zzz", "world"], "o w", " "])
async def test_stop_string_across_tokens_cuts_the_text_and_ends_the_work(
    front: Cluster, client: AsyncOpenAI, stop: str | list[str]
) -> None:
    front.answers("hello world over the dog")
    stream = await client.completions.create(model="tiny", prompt="x", max_tokens=50, stop=stop, stream=True)
    chunks = [chunk async for chunk in stream]
    first = min("hello world over the dog".find(s) for s in ([stop] if isinstance(stop, str) else stop) if s != "zzz")
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello world over the dog"[:first]
    assert chunks[-1].choices[0].finish_reason == "stop"
    await front.decode.hears("cancel")
    await front.conductor.hears("finished")


async def test_what_only_looked_like_a_stop_string_comes_out_in_the_end(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world", eos=True)
    answer = await client.completions.create(model="tiny", prompt="x", max_tokens=50, stop=["world!", "d?"])
    assert answer.choices[0].text == "hello world"


async def test_a_stop_string_hides_the_logprobs_of_what_it_cut(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world over")
    answer = await client.completions.create(model="tiny", prompt="x", max_tokens=50, stop=" world", logprobs=0)
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.tokens is not None
    assert "".join(answer.choices[0].logprobs.tokens) == answer.choices[0].text == "hello"


async def test_stop_strings_count_only_after_min_tokens(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world hello world")
    tokens = front.tokenizer.encode("hello world hello world")
    answer = await client.completions.create(
        model="tiny", prompt="x", max_tokens=50, stop="hello", extra_body={"min_tokens": len(tokens) // 2}
    )
    assert answer.choices[0].text == "hello world "


async def test_the_request_id_is_also_a_header(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello")
    response = await client.completions.with_raw_response.create(model="tiny", prompt="x", max_tokens=1)
    assert response.headers["x-request-id"] == response.parse().id


async def test_harmless_unknown_fields_are_accepted(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello")
    await client.completions.create(
        model="tiny", prompt="x", max_tokens=1, user="u", extra_body={"metadata": {"a": "b"}, "store": True}
    )
