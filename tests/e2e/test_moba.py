"""MoBA over the API: both roles and the cache give what one engine does, with full and with sparse decode."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import up
from tests.e2e.endpoint import Endpoint, Vocabulary
from tests.e2e.prompts import random_prompt
from tests.workers.engines import engine, run, sequence

pytestmark = pytest.mark.slow

LENGTHS = (40, 130, 333, 700)


@pytest.fixture(scope="module", params=["full", "moba"])
def moba(request: pytest.FixtureRequest) -> str:
    return f"block_size=64,top_k=2,full_layers=1,min_length=96,decode={request.param}"


@pytest.fixture(scope="module")
def sparse(
    moba: str, tiny_llama: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    flags = (f"--moba={moba}", "--max-batched-tokens=128")
    with up(tmp_path_factory.mktemp("sparse"), tiny_llama, vocabulary, *flags) as endpoint:
        yield endpoint


async def test_greedy_output_is_that_of_one_engine(sparse: Endpoint, moba: str, tiny_llama: Path) -> None:
    prompts = [random_prompt(length, sparse.vocabulary.size, "moba") for length in LENGTHS]
    first, second = await sparse.complete_all(prompts), await sparse.complete_all(prompts)
    alone = engine(tiny_llama, moba=moba)
    expected = run(alone, [sequence(prompt, str(i), max_tokens=16) for i, prompt in enumerate(prompts)])
    assert [list(answer.token_ids) for answer in first] == expected
    assert [list(answer.token_ids) for answer in second] == expected
    assert [answer.cached_tokens for answer in second] == [len(prompt) - 1 for prompt in prompts]
