"""In float32, outputs are those of transformers, whatever else the cluster does and wherever a prompt's blocks are."""

import pytest

from tests.e2e.endpoint import Endpoint
from tests.e2e.prompts import random_prompt
from tests.e2e.reference import Reference

LENGTHS = (1, 31, 32, 33, 500, 1500)
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": 2**63 + 11}


def prompts(endpoint: Endpoint, seed: str) -> list[list[int]]:
    return [random_prompt(length, endpoint.vocabulary.size, seed) for length in LENGTHS]


@pytest.fixture(params=["tiny", "pairs"])
def endpoint(request: pytest.FixtureRequest) -> Endpoint:
    """Each of the two clusters in turn."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Endpoint)
    return found


async def test_greedy_output_is_that_of_transformers_concurrently_and_from_the_cache(
    endpoint: Endpoint, reference: Reference
) -> None:
    asked = prompts(endpoint, "concurrent")
    first = await endpoint.complete_all(asked)
    second = await endpoint.complete_all(asked)
    for prompt, answer in zip(asked, first, strict=True):
        reference.assert_greedy(prompt, answer)
    assert [answer.cached_tokens for answer in first] == [0] * len(asked)
    assert [answer.cached_tokens for answer in second] == [len(prompt) - 1 for prompt in asked]
    assert [answer.token_ids for answer in second] == [answer.token_ids for answer in first]


async def test_greedy_output_is_that_of_transformers_alone(endpoint: Endpoint, reference: Reference) -> None:
    for prompt in prompts(endpoint, "alone"):
        reference.assert_greedy(prompt, await endpoint.complete(prompt))


async def test_a_prompt_whose_prefix_is_cached_continues_exactly(endpoint: Endpoint, reference: Reference) -> None:
    whole = random_prompt(300, endpoint.vocabulary.size, "prefix")
    await endpoint.complete(whole[:100])
    answer = await endpoint.complete(whole)
    assert answer.cached_tokens == 96  # three whole blocks; the partial one is of another prompt
    reference.assert_greedy(whole, answer)


async def test_seeded_sampling_draws_the_same_tokens_again_in_any_batch_and_on_another_cluster(
    tiny: Endpoint, pairs: Endpoint
) -> None:
    asked = prompts(tiny, "sampled")
    alone = [await tiny.complete(prompt, 24, **SAMPLED) for prompt in asked]
    batched = await tiny.complete_all(asked, 24, **SAMPLED)
    elsewhere = await pairs.complete_all(asked, 24, **SAMPLED)
    tokens = [answer.token_ids for answer in alone]
    assert [answer.token_ids for answer in batched] == tokens
    assert [answer.token_ids for answer in elsewhere] == tokens
    greedy = await tiny.complete_all(asked, 24)
    assert [answer.token_ids for answer in greedy] != tokens


async def test_without_a_seed_two_samples_differ(tiny: Endpoint) -> None:
    prompt = random_prompt(20, tiny.vocabulary.size, "unseeded")
    first, second = await tiny.complete_all([prompt, prompt], 32, temperature=1.0)
    assert first.token_ids != second.token_ids
