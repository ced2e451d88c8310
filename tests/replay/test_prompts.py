"""Two prompts share exactly what their block ids share."""

from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.replay.errors import TraceError
from perigee.replay.prompts import Prompts, ordinary_tokens
from perigee.replay.trace import TraceRequest, read_trace, scale

TOKENS = ordinary_tokens(32_000)


def request(input_tokens: int, *prefix_ids: int, block_tokens: int = 8) -> TraceRequest:
    return TraceRequest(0.0, input_tokens, 1, prefix_ids, block_tokens)


def common_prefix(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def shared_tokens(first: TraceRequest, second: TraceRequest) -> int:
    """What the ids say is shared."""
    num_shared = common_prefix(list(first.prefix_ids), list(second.prefix_ids))
    return min(num_shared * first.block_tokens, first.input_tokens, second.input_tokens)


@st.composite
def traces(draw: st.DrawFn) -> list[TraceRequest]:
    """Small traces full of shared prefixes: an id is a path in a tree, as equal ids must be equal prefixes."""
    paths = draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=2, max_size=8))
    ids: dict[tuple[int, ...], int] = {}
    requests = []
    for path in paths:
        prefixes = [tuple(path[:end]) for end in range(1, len(path) + 1)]
        last = draw(st.integers(1, 8))
        requests.append(request(8 * (len(path) - 1) + last, *(ids.setdefault(p, len(ids)) for p in prefixes)))
    return requests


@given(trace=traces(), seed=st.integers(0, 3), vocab_size=st.sampled_from([16, 32_000]))
def test_prompts_share_what_their_ids_share(trace: list[TraceRequest], seed: int, vocab_size: int) -> None:
    prompts = Prompts(trace, ordinary_tokens(vocab_size), seed)
    for first, second in combinations(trace, 2):
        shared = common_prefix(prompts.token_ids(first), prompts.token_ids(second))
        assert shared == shared_tokens(first, second)


@pytest.mark.parametrize("length_scale", [1.0, 0.0625])
def test_the_conversation_trace_shares_what_its_ids_share(mooncake_path: Path, length_scale: float) -> None:
    trace = scale(read_trace(mooncake_path)[:150], length_scale)
    prompts = Prompts(trace, TOKENS, seed=0)
    made = [prompts.token_ids(request) for request in trace]
    assert [len(prompt) for prompt in made] == [request.input_tokens for request in trace]
    for (first, a), (second, b) in combinations(zip(trace, made, strict=True), 2):
        assert common_prefix(a, b) == shared_tokens(first, second)


def test_the_same_last_id_at_different_lengths_shares_the_shorter_prefix() -> None:
    short, long = request(11, 1, 2), request(24, 1, 2, 3)
    prompts = Prompts([short, long], TOKENS, seed=0)
    assert prompts.token_ids(long)[:11] == prompts.token_ids(short)


def test_prompts_depend_on_the_seed_and_not_on_the_order_they_are_asked_for() -> None:
    trace = [request(16, 1, 2), request(16, 1, 3)]
    forward, backward = Prompts(trace, TOKENS, seed=1), Prompts(trace, TOKENS, seed=1)
    made = [forward.token_ids(request) for request in trace]
    assert made == [backward.token_ids(request) for request in reversed(trace)][::-1]
    assert common_prefix(made[0], Prompts(trace, TOKENS, seed=2).token_ids(trace[0])) == 0


def test_more_siblings_than_tokens_differ_within_the_block() -> None:
    trace = [request(8, number) for number in range(1000)]
    tokens = ordinary_tokens(16)
    prompts = Prompts(trace, tokens, seed=0)
    assert len({tuple(prompts.token_ids(request)) for request in trace}) == 1000


def test_a_vocabulary_too_small_for_the_trace_is_refused() -> None:
    trace = [request(1, number, block_tokens=1) for number in range(13)]
    with pytest.raises(TraceError, match="vocab_size: 12 ordinary tokens cannot tell apart 13 blocks of 1 tokens"):
        Prompts(trace, ordinary_tokens(16), seed=0)


@pytest.mark.parametrize("vocab_size", [16, 512, 49_152, 163_840])
def test_tokens_keep_away_from_both_ends_of_the_vocabulary(vocab_size: int) -> None:
    trace = [request(8, number) for number in range(300)]
    prompts = Prompts(trace, ordinary_tokens(vocab_size), seed=0)
    used = {token for request in trace for token in prompts.token_ids(request)}
    assert min(used) >= vocab_size // 8
    assert max(used) < vocab_size - vocab_size // 8
