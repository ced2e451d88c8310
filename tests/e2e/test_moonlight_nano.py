"""The built-in Moonlight over the API: what one engine computes, from both roles and the cache, sparse and full."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from openai import AsyncOpenAI

from perigee.bench.haystack import haystacks
from perigee.workers.model.checkpoint import NANO, resolve
from perigee.workers.model.config import load_config
from perigee.workers.model.tokenizer import Tokenizer
from tests.e2e.conftest import up
from tests.e2e.endpoint import Endpoint, Vocabulary
from tests.workers.engines import engine, run, sequence

pytestmark = pytest.mark.slow

LENGTHS = (60, 200, 700, 1500)
FILLER = "".join(f"Line {index} of a text that says nothing of any key.\n" for index in range(2000))
# As the checkpoint says, which is MoBA for prompts; for outputs as well; and not at all.
ATTENTIONS = {"sparse prompts": "", "sparse": "block_size=128,top_k=4,full_layers=1,decode=moba", "full": "off"}


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve(NANO, "float32")


@pytest.fixture(scope="module", params=ATTENTIONS.values(), ids=ATTENTIONS.keys())
def moba(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def nano(moba: str, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    flags = (f"--moba={moba}", "--max-batched-tokens=512")
    with up(tmp_path_factory.mktemp("nano"), Path(NANO), Vocabulary(directory), *flags) as endpoint:
        yield endpoint


def prompts(directory: Path) -> list[list[int]]:
    tokenizer = Tokenizer.load(directory)
    return [
        list(needle.prompt)
        for length in LENGTHS
        for needle in haystacks(tokenizer, FILLER, Random(length), length, num_facts=1, count=1)
    ]


async def test_greedy_output_is_that_of_one_engine_and_of_the_cache(nano: Endpoint, moba: str, directory: Path) -> None:
    asked = prompts(directory)
    first, second = await nano.complete_all(asked), await nano.complete_all(asked)
    alone = engine(directory, moba=moba)
    expected = run(alone, [sequence(prompt, str(i), max_tokens=16) for i, prompt in enumerate(asked)])
    assert [list(answer.token_ids) for answer in first] == expected
    assert [list(answer.token_ids) for answer in second] == expected
    assert [answer.cached_tokens for answer in second] == [len(prompt) - 1 for prompt in asked]


async def test_a_pass_key_is_found_again(nano: Endpoint) -> None:
    text = f"{FILLER[:2000]}The pass key of silver falcon is 48213.\n{FILLER[:1000]}The pass key of silver falcon is"
    async with AsyncOpenAI(base_url=f"{nano.url}/v1", api_key="none") as client:
        answer = await client.completions.create(model=nano.model, prompt=text, temperature=0, max_tokens=7)
    assert answer.choices[0].text == " 48213."


async def test_a_chat_is_answered(nano: Endpoint) -> None:
    name = "silver falcon"
    async with AsyncOpenAI(base_url=f"{nano.url}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(
            model=nano.model,
            messages=[{"role": "user", "content": f"The pass key of {name} is 48213. What is the key for {name}?"}],
            temperature=0,
            max_completion_tokens=32,
        )
    content = answer.choices[0].message.content
    assert content is not None and content.startswith("The key for ")
    assert answer.choices[0].finish_reason == "stop"


def test_the_checkpoint_asks_for_moba(directory: Path) -> None:
    moba = load_config(directory).moba
    assert moba is not None and moba.full_layers == 1 and moba.decode == "full"
