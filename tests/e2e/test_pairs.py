"""Two prefill and two decode workers share the work, and one store node's blocks."""

from tests.e2e.endpoint import Endpoint, totals
from tests.e2e.prompts import random_prompt


async def test_requests_are_spread_over_all_workers(pairs: Endpoint) -> None:
    before = await pairs.until_at_rest()
    num_requests = totals(before, "decode", "max_sequences")[0] + 8  # more than one decode worker holds
    prompts = [random_prompt(100, pairs.vocabulary.size, f"spread {index}") for index in range(num_requests)]
    await pairs.complete_all(prompts, max_tokens=50)
    after = await pairs.until_at_rest()
    for role, field in (("prefill", "computed_prompt_tokens_total"), ("decode", "output_tokens_total")):
        increase = [b - a for a, b in zip(totals(before, role, field), totals(after, role, field), strict=True)]
        assert len(increase) == 2
        assert all(increase), f"{role}: {increase}"
    assert totals(after, "decode", "computed_prompt_tokens_total") == [0, 0]


async def test_blocks_that_one_worker_computed_are_hits_for_all(pairs: Endpoint) -> None:
    prefix = random_prompt(320, pairs.vocabulary.size, "shared")
    await pairs.complete(prefix, max_tokens=1)
    before = totals(await pairs.until_at_rest(), "prefill", "cached_prompt_tokens_total")
    for count in range(8, 200, 8):  # of eight that come one by one, on a busy machine, all may go to one worker
        suffixes = [random_prompt(1000, pairs.vocabulary.size, f"suffix {count} {index}") for index in range(8)]
        answers = await pairs.complete_all([*prefix, *suffix] for suffix in suffixes)
        assert [answer.cached_tokens for answer in answers] == [320] * 8
        after = totals(await pairs.until_at_rest(), "prefill", "cached_prompt_tokens_total")
        assert sum(after) - sum(before) == count * 320
        if all(now > then for then, now in zip(before, after, strict=True)):
            return
    raise AssertionError(f"one worker took all: {before}, {after}")
