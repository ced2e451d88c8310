"""`perigee bench eviction`: the ratios that are known of the trace, and MIN above all others."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.bench.errors import BenchError
from perigee.bench.eviction import EvictionBenchConfig, run
from perigee.bench.foresight import Foresight
from perigee.kvstore.evict import LRU, HitDensity, PolicyName, make_policy
from perigee.replay.cache_walk import Prompt, prompts_of, walk
from perigee.replay.errors import TraceError
from perigee.replay.trace import TraceRequest, read_trace
from tests.kvstore.keys import key

NAMES: tuple[PolicyName, ...] = get_args(PolicyName)
TRACE = Path(__file__).parents[3] / "shared" / "traces" / "mooncake_conversation.jsonl"


@pytest.fixture(scope="module")
def mooncake_path() -> Path:
    if not TRACE.exists():
        pytest.skip(f"{TRACE} is not there")
    return TRACE


def prompts_like(paths: list[str]) -> list[Prompt]:
    """Each letter of a path is a block; equal beginnings are shared."""
    return [tuple(key(path[: end + 1]) for end in range(len(path))) for path in paths]


@settings(deadline=None, max_examples=60)
@given(paths=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=30), num_slots=st.integers(1, 8))
def test_nothing_beats_foresight(paths: list[str], num_slots: int) -> None:
    prompts = prompts_like(paths)
    best = walk(prompts, num_slots, Foresight(prompts, num_slots))
    for name in NAMES:
        assert walk(prompts, num_slots, make_policy(name, num_slots)).num_hits <= best.num_hits


def test_only_what_follows_a_hit_is_a_hit() -> None:
    prompts = prompts_like(["ab", "cd", "ab", "ax"])
    assert walk(prompts, 8, LRU()).num_hits == 3
    assert walk(prompts, 2, LRU()).num_hits == 1


def test_a_prompt_longer_than_the_arena_keeps_its_beginning() -> None:
    prompts = prompts_like(["abcd", "abcd"])
    assert walk(prompts, 2, LRU()).num_hits == 2


def test_blocks_may_be_smaller_than_those_of_the_trace_but_must_divide_them() -> None:
    trace = [TraceRequest(0.0, 700, 1, (1, 2), 512), TraceRequest(1.0, 600, 1, (1, 3), 512)]
    first, second = prompts_of(trace, 256)
    assert (len(first), len(second)) == (3, 3)
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    with pytest.raises(TraceError, match="block_tokens: 100 given, allowed are divisors of 512"):
        prompts_of(trace, 100)


def test_shared_system_prompts_survive_a_flood_of_questions_asked_once() -> None:
    """Forty tools in turn, each with a prompt of ten blocks, and five new ones a question: LRU loses half of them."""
    trace = [
        tuple(key(f"tool {number % 40}/{index}") for index in range(10))
        + tuple(key(f"question {number}/{index}") for index in range(5))
        for number in range(1200)
    ]
    assert walk(trace, 300, HitDensity(300)).hit_ratio > walk(trace, 300, LRU()).hit_ratio + 0.1


def test_a_slice_of_the_conversation_trace_is_hit_more_often_than_with_lru(mooncake_path: Path) -> None:
    prompts = prompts_of(read_trace(mooncake_path)[:1500], 512)
    assert walk(prompts, 1000, HitDensity(1000)).hit_ratio > walk(prompts, 1000, LRU()).hit_ratio


@pytest.mark.slow
def test_the_conversation_trace_at_three_million_tokens(mooncake_path: Path) -> None:
    command = [sys.executable, "-m", "perigee", "bench", "eviction", str(mooncake_path), "--json=-"]
    ended = subprocess.run([*command, "--capacity-tokens=3000000"], capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    ratios = json.loads(ended.stdout)["hit_ratio"]
    assert ratios["lru"] == pytest.approx(0.1361, abs=5e-5)
    assert ratios["perigee"] >= 0.175
    assert ratios["min"] == pytest.approx(0.350, abs=2e-3)
    assert list(ratios) == ["lru", "s3fifo", "perigee", "min"]


def test_an_arena_of_no_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="--capacity-tokens: 511 given"):
        run(EvictionBenchConfig(trace=tmp_path / "none", capacity_tokens=511))


def test_a_trace_that_names_no_blocks_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "azure.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,374,109\n"
    )
    with pytest.raises(BenchError, match="no block of it returns; allowed are traces whose prompts name their blocks"):
        run(EvictionBenchConfig(trace=trace))
