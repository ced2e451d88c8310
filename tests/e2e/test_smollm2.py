"""The built-in model: its greedy output in float32 is that of transformers, and it makes sense."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from perigee.workers.model.checkpoint import DEFAULT_MODEL, resolve
from tests.e2e.conftest import up
from tests.e2e.endpoint import Answer, Endpoint, Vocabulary
from tests.e2e.prompts import text_prompts
from tests.e2e.reference import Reference

pytestmark = pytest.mark.slow

# More than 256 tokens are computed in several chunks, fewer alone in one.
LENGTHS = (5, 8, 13, 21, 31, 32, 33, 47, 63, 64, 65, 80, 96, 127, 128, 129, 180, 255, 256, 257, 400, 777, 1024, 1500)
MAX_BATCHED_TOKENS = 256


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve(DEFAULT_MODEL, "float32")


@pytest.fixture(scope="module")
def smollm2(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    flags = f"--max-batched-tokens={MAX_BATCHED_TOKENS}"
    with up(tmp_path_factory.mktemp("smollm2"), directory, Vocabulary(directory), flags) as endpoint:
        yield endpoint


async def alone(endpoint: Endpoint, prompts: list[list[int]]) -> list[Answer]:
    return [await endpoint.complete(prompt) for prompt in prompts]


async def test_greedy_output_is_that_of_transformers_alone_and_concurrent_cached_and_not(
    smollm2: Endpoint, directory: Path
) -> None:
    prompts = text_prompts(LENGTHS, smollm2.vocabulary.encode)
    assert [len(prompt) for prompt in prompts] == list(LENGTHS)
    one_half, other_half = prompts[::2], prompts[1::2]
    first = await alone(smollm2, one_half) + await smollm2.complete_all(other_half)
    second = await smollm2.complete_all(one_half) + await alone(smollm2, other_half)
    assert sum(answer.cached_tokens for answer in first) == 0
    asked = one_half + other_half
    assert [answer.cached_tokens for answer in second] == [len(prompt) - 1 for prompt in asked]
    assert [answer.token_ids for answer in second] == [answer.token_ids for answer in first]
    reference = Reference.load(directory)
    for prompt, answer in zip(asked, first, strict=True):
        assert len(answer.token_ids) == 16
        reference.assert_greedy(prompt, answer)


async def test_a_chat_answer_makes_sense_and_ends_by_itself(smollm2: Endpoint) -> None:
    async with AsyncOpenAI(base_url=f"{smollm2.url}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(
            model=smollm2.model,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_completion_tokens=100,
        )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert "Paris" in (choice.message.content or "")
