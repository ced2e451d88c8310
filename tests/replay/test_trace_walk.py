"""The reference walk agrees with what is known of the trace, and with a case small enough to do by hand."""

from pathlib import Path

import pytest

from perigee.replay.trace import TraceRequest, read_trace, scale
from tests.replay.trace_walk import UNLIMITED, allowed_cached_ratio, walk


def request(input_tokens: int, *prefix_ids: int) -> TraceRequest:
    return TraceRequest(0.0, input_tokens, 10, prefix_ids, 8)


@pytest.mark.parametrize(
    ("capacity_tokens", "ratio"),
    [
        (UNLIMITED, 0.3664),
        (1_000_000, 0.0533),
        (3_000_000, 0.1361),
        (10_000_000, 0.2852),
    ],
)
def test_block_hit_ratio_of_the_conversation_trace(mooncake_path: Path, capacity_tokens: float, ratio: float) -> None:
    result = walk(read_trace(mooncake_path), capacity_tokens // 512, 512)
    assert result.block_ratio == pytest.approx(ratio, abs=5e-5)


def test_scaling_keeps_the_block_hit_ratio(mooncake_path: Path) -> None:
    trace = read_trace(mooncake_path)[:2000]
    assert walk(scale(trace, 1 / 16), 2000, 32).hit_blocks == walk(trace, 2000, 512).hit_blocks


def test_a_prompt_that_is_all_cached_still_computes_its_last_token() -> None:
    assert walk([request(16, 1, 2), request(16, 1, 2)], UNLIMITED, 8).hit_tokens == 15


def test_a_partial_block_is_not_the_full_block() -> None:
    assert walk([request(12, 1, 2), request(16, 1, 2)], UNLIMITED, 8).hit_tokens == 8


def test_trace_blocks_may_hold_several_cache_blocks() -> None:
    assert walk([request(8, 1), request(12, 1, 2)], UNLIMITED, 4).hit_tokens == 8


def test_a_leaf_goes_before_its_parent_though_the_parent_was_used_before_it() -> None:
    trace = [request(24, 1, 2, 3), request(8, 4), request(24, 1, 2, 3)]
    assert walk(trace, 3, 8).hit_blocks == 2


def test_the_least_recently_used_leaf_goes_first() -> None:
    trace = [request(8, 1), request(8, 2), request(8, 1), request(8, 3), request(8, 1), request(8, 2)]
    assert walk(trace, 2, 8).hit_blocks == 2


def test_a_prompt_longer_than_the_cache_keeps_its_beginning() -> None:
    assert walk([request(24, 1, 2, 3), request(24, 1, 2, 3)], 2, 8).hit_blocks == 2


def test_outputs_take_room() -> None:
    trace = [request(8, 1), request(8, 2), request(8, 1)]
    assert allowed_cached_ratio(trace, 2, 8) == pytest.approx(7 / 24)
    assert allowed_cached_ratio(trace, 2, 8, served=True) == 0
