"""Prefill and decode are different processes, and blocks of KVCache are all that goes from one to the other."""

from collections.abc import Mapping

from tests.e2e.endpoint import Endpoint, totals
from tests.e2e.prompts import random_prompt

LENGTHS = (1, 31, 32, 33, 100, 500)
COMPUTED = "computed_prompt_tokens_total"


async def computed(endpoint: Endpoint) -> Mapping[str, int]:
    """Prompt tokens computed by role."""
    members = await endpoint.until_at_rest()
    return {role: sum(totals(members, role, COMPUTED)) for role in ("prefill", "decode")}


async def test_prefill_and_decode_are_different_processes(tiny: Endpoint) -> None:
    members = await tiny.members()
    assert {member.role for member in members.values()} == {"prefill", "decode", "store"}
    assert len({member.pid for member in members.values()}) == len(members)


async def test_prefill_computes_what_is_not_cached_and_decode_no_prompt_token(tiny: Endpoint) -> None:
    before = await computed(tiny)
    asked = [random_prompt(length, tiny.vocabulary.size, "computed") for length in LENGTHS]
    answers = await tiny.complete_all(asked) + await tiny.complete_all(asked)
    not_cached = 2 * sum(LENGTHS) - sum(answer.cached_tokens for answer in answers)
    assert not_cached == sum(LENGTHS) + len(LENGTHS)  # of a prompt that is all cached, the last token is computed
    after = await computed(tiny)
    assert after["prefill"] - before["prefill"] == not_cached
    assert after["decode"] == 0


async def test_a_prompt_that_is_wholly_cached_is_computed_for_one_token_only(tiny: Endpoint) -> None:
    prompt = random_prompt(1000, tiny.vocabulary.size, "wholly cached")
    first = await tiny.complete(prompt)
    before = await computed(tiny)
    second = await tiny.complete(prompt)
    after = await computed(tiny)
    assert (first.cached_tokens, second.cached_tokens) == (0, 999)
    assert after["prefill"] - before["prefill"] == 1
    assert second.token_ids == first.token_ids


async def test_metrics_tell_who_computed_prompt_tokens(tiny: Endpoint) -> None:
    await tiny.complete(random_prompt(40, tiny.vocabulary.size, "metrics"))
    counted = await computed(tiny)
    for role, tokens in counted.items():
        name = "perigee_worker_prompt_tokens_computed_total"
        assert await tiny.metric(name, worker=f"{role}-0", role=role) == tokens
    assert await tiny.metric("perigee_orphaned_blocks") == 0


async def test_a_partial_block_is_handed_over_and_is_a_hit_for_the_same_prompt(tiny: Endpoint) -> None:
    prompt = random_prompt(32 + 13, tiny.vocabulary.size, "partial")
    first = await tiny.complete(prompt)
    second = await tiny.complete(prompt)
    assert (first.cached_tokens, second.cached_tokens) == (0, 44)
    assert second.token_ids == first.token_ids


async def test_blocks_that_decode_completed_are_hits_for_the_next_turn(tiny: Endpoint) -> None:
    prompt = random_prompt(45, tiny.vocabulary.size, "turns")
    answer = await tiny.complete(prompt, max_tokens=60)
    await tiny.until_at_rest()  # by then decode has put away its blocks
    turn = [*prompt, *answer.token_ids, *random_prompt(10, tiny.vocabulary.size, "next turn")]
    next_answer = await tiny.complete(turn)
    assert next_answer.cached_tokens == 96  # of 45 + 60 tokens, all whole blocks


async def test_a_request_for_one_token_leaves_nothing_behind(tiny: Endpoint) -> None:
    answer = await tiny.complete(random_prompt(50, tiny.vocabulary.size, "one token"), max_tokens=1)
    assert (len(answer.token_ids), answer.finish_reason) == (1, "length")
    await tiny.until_at_rest()
