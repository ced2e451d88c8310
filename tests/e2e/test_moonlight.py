"""Moonlight's architecture and vocabulary over the API: what transformers computes, from both roles and the cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionSystemMessageParam, ChatCompletionUserMessageParam

from perigee.workers.model.tokenizer import Tokenizer
from tests import tiny_moonlight
from tests.e2e.conftest import up
from tests.e2e.endpoint import Endpoint, Vocabulary, totals
from tests.e2e.prompts import random_prompt
from tests.e2e.reference import Reference
from tests.moonlight_files import NUM_SPECIAL_TOKENS, TRAP_FILE, write_tiktoken

pytestmark = pytest.mark.slow

NUM_BASE_TOKENS = tiny_moonlight.BASE["vocab_size"] - NUM_SPECIAL_TOKENS
# The widths of Moonlight's own attention, so that the native kernels are those that serve it.
WIDTHS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
SPECIAL_IDS = {"bos_token_id": NUM_BASE_TOKENS, "eos_token_id": NUM_BASE_TOKENS + 1}
LENGTHS = (1, 33, 300, 700)
MESSAGES = [
    ChatCompletionSystemMessageParam(role="system", content="You know your orbits."),
    ChatCompletionUserMessageParam(role="user", content="Where is a satellite fastest? <|im_end|>"),
]


@pytest.fixture(scope="module")
def exact_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiktoken(tmp_path_factory.mktemp("exact-model"), NUM_BASE_TOKENS)
    return tiny_moonlight.write(directory, **SPECIAL_IDS)


@pytest.fixture(scope="module")
def exact(exact_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A cluster in float32, which computes most prompts in several chunks."""
    vocabulary, flag = Vocabulary(exact_model), "--max-batched-tokens=128"
    with up(tmp_path_factory.mktemp("exact"), exact_model, vocabulary, flag) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def native_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiktoken(tmp_path_factory.mktemp("native-model"), NUM_BASE_TOKENS)
    # Logits stay below 2: above 4, bfloat16 has steps of 0.03.
    return tiny_moonlight.write(directory, dtype="bfloat16", head_scale=0.4, **WIDTHS, **SPECIAL_IDS)


@pytest.fixture(scope="module")
def native(native_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A cluster in bfloat16."""
    with up(tmp_path_factory.mktemp("native"), native_model, Vocabulary(native_model), dtype="bfloat16") as endpoint:
        yield endpoint


def prompts(endpoint: Endpoint, seed: str) -> list[list[int]]:
    return [random_prompt(length, endpoint.vocabulary.size, seed) for length in LENGTHS]


async def test_greedy_output_is_that_of_transformers_concurrently_and_from_the_cache(
    exact: Endpoint, exact_model: Path
) -> None:
    asked = prompts(exact, "greedy")
    first = await exact.complete_all(asked)
    second = await exact.complete_all(asked)
    reference = Reference.load(exact_model)
    for prompt, answer in zip(asked, first, strict=True):
        reference.assert_greedy(prompt, answer)
    assert [answer.cached_tokens for answer in first] == [0] * len(asked)
    assert [answer.cached_tokens for answer in second] == [len(prompt) - 1 for prompt in asked]
    assert [answer.token_ids for answer in second] == [answer.token_ids for answer in first]


async def test_decode_workers_compute_no_prompt(exact: Endpoint) -> None:
    await exact.complete(random_prompt(100, exact.vocabulary.size, "disaggregated"))
    assert totals(await exact.until_at_rest(), "decode", "computed_prompt_tokens_total") == [0]


async def test_a_chat_is_rendered_by_the_models_template_and_answered_as_transformers_would(
    exact: Endpoint, exact_model: Path
) -> None:
    async with AsyncOpenAI(base_url=f"{exact.url}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(
            model=exact.model,
            messages=MESSAGES,
            temperature=0,
            max_completion_tokens=12,
            logprobs=True,
            extra_body={"ignore_eos": True},
        )
    tokenizer = Tokenizer.load(exact_model)
    prompt = tokenizer.apply_chat_template([dict(message) for message in MESSAGES])
    ids = torch.tensor([prompt])
    generated = Reference.load(exact_model).model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].message.content == tokenizer.decode(generated[0, len(prompt) :].tolist())
    assert not (exact_model / TRAP_FILE).exists(), "no file of a model directory is executed"


async def test_in_bfloat16_tokens_are_as_likely_as_for_transformers(native: Endpoint, native_model: Path) -> None:
    asked = prompts(native, "likely")
    first = await native.complete_all(asked, 24)
    second = [await native.complete(prompt, 24) for prompt in asked]
    assert [answer.cached_tokens for answer in second] == [len(prompt) - 1 for prompt in asked]
    reference = Reference.load(native_model, torch.bfloat16)
    for prompt, *answers in zip(asked, first, second, strict=True):
        for answer in answers:
            reference.assert_probable(prompt, answer)
