"""`perigee replay` of a real trace against a cluster: nothing fails, and the cache does what the trace allows."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perigee.replay.trace import read_trace, scale
from tests.e2e.conftest import up
from tests.e2e.endpoint import Endpoint, Vocabulary
from tests.replay.trace_walk import walk

pytestmark = pytest.mark.slow

TRACE = Path(__file__).parents[3] / "shared" / "traces" / "mooncake_conversation.jsonl"
NUM_REQUESTS = 1000
LENGTH_SCALE = 0.0625  # makes a trace block of 512 tokens one block of 32
BLOCK_TOKENS = 32
SPEED = 3  # so that two cores can follow


@pytest.fixture(scope="module")
def roomy(tiny_llama: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Room for all requests that pile up, even on a slow machine, and a cache for half of the trace."""
    flags = ("--max-sequences=512", "--kv-tokens=400000", "--max-batched-tokens=1024", "--dram-bytes=1GiB")
    flags += ("--admission=none",)  # nothing is to be refused because it would have to wait for long
    with up(tmp_path_factory.mktemp("roomy"), tiny_llama, vocabulary, *flags) as endpoint:
        yield endpoint


def replay(url: str, report: Path) -> Any:
    """The report of the trace's first requests."""
    flags = (f"--url={url}", f"--limit={NUM_REQUESTS}", f"--speed={SPEED}", f"--length-scale={LENGTH_SCALE}")
    command = [sys.executable, "-m", "perigee", "replay", str(TRACE), *flags, f"--json={report}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(report.read_text())


@pytest.mark.timeout(900)  # the requests come over a hundred seconds; who is slower than they are needs longer
async def test_a_thousand_requests_of_the_conversation_trace_are_served_with_the_hits_that_it_allows(
    roomy: Endpoint, tmp_path: Path
) -> None:
    if not TRACE.exists():
        pytest.skip(f"{TRACE} is not there")
    report = replay(roomy.url, tmp_path / "report.json")
    assert (report["requests"], report["failed"], report["rejected"]) == (NUM_REQUESTS, 0, 0)
    members = await roomy.until_at_rest()
    store = members["store-0"].load
    assert store["evicted_total"] > 0
    trace = scale(read_trace(TRACE)[:NUM_REQUESTS], LENGTH_SCALE)
    allowed = walk(trace, store["num_slots"], BLOCK_TOKENS, served=True)
    assert report["prompt_tokens"] == allowed.tokens
    assert report["cached_token_ratio"] == pytest.approx(allowed.token_ratio, abs=0.02)
    assert await roomy.metric("perigee_orphaned_blocks") == 0
    by_tier, series = report["cached_by_tier"], report["series"]
    assert sum(by_tier.values()) == pytest.approx(report["cached_token_ratio"] * report["prompt_tokens"])
    assert len(series["at_s"]) == len(series["decode_load"]) == len(series["queued_tokens"]) > 10
    assert max(series["decode_load"]) > 0 and max(series["queued_tokens"]) > 0


def test_the_report_says_what_a_shadow_would_have_done(
    tiny_llama: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{number / 20},64,4\n" for number in range(20))
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + rows)
    flags = ("--prefill=2", "--shadow=placement=random,admission=none", "--tenant-weights=gold=4")
    with up(tmp_path_factory.mktemp("shadow"), tiny_llama, vocabulary, *flags) as endpoint:
        command = [sys.executable, "-m", "perigee", "replay", str(trace), f"--url={endpoint.url}", "--json=-"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    shadow = json.loads(ended.stdout)["shadow"]
    assert (shadow["decisions"], shadow["both_served"], shadow["second"]["checks"]) == (20, 20, 20)
    assert shadow["shadow"]["ttft_s"]["mean"] > 0
    assert "What a shadow would have done" in ended.stderr
