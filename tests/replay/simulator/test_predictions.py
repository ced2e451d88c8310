"""How good the scheduler's predictions are where nothing disturbs: what is left is what it cannot know."""

import random
from pathlib import Path

import pytest

from perigee.replay.metrics import Report, Slo, summarize
from perigee.replay.simulator.cluster import Cluster
from perigee.replay.simulator.simulation import simulate
from perigee.replay.trace import TraceRequest
from perigee.scheduler.cost import CostProfile
from tests.replay.simulator.clusters import BLOCK, DECODE, PREFILL, cluster

# A small model on one CPU core.
SLOW = CostProfile(
    prefill_fixed_s=0.05,
    prefill_token_s=1e-3,
    prefill_pair_s=4e-7,
    load_fixed_s=1e-3,
    load_token_s=1e-5,
    step_fixed_s=0.05,
    step_sequence_s=1e-3,
    step_context_token_s=7e-6,
)
ROOM = {"capacity_tokens": 200_000, "kv_tokens": 65_536, "max_sequences": 64}
GROUPS = ({**PREFILL, **ROOM, "chunk_tokens": 2048}, {**DECODE, **ROOM})


def poisson(utilization: float, count: int = 200) -> list[TraceRequest]:
    """Prompts of 30 to 1500 tokens, which come at random and keep one worker busy for such a share of the time."""
    lot = random.Random(7)
    lengths = [int(min(1500, max(30, lot.lognormvariate(5.5, 0.8)))) for _ in range(count)]
    mean_s = sum(SLOW.prefill_s(length, 0) for length in lengths) / count
    requests, now = [], 0.0
    for index, length in enumerate(lengths):
        now += lot.expovariate(utilization / mean_s)
        ids = tuple(range(100 * index, 100 * index - (-length // BLOCK)))
        requests.append(TraceRequest(now, length, lot.randint(4, 60), ids, BLOCK))
    return requests


def served(trace: list[TraceRequest], on: Cluster) -> Report:
    return summarize(simulate(trace, on).records, Slo())


@pytest.mark.parametrize("utilization", [0.3, 0.5])
def test_ttft_is_predicted_under_steady_load(tmp_path: Path, utilization: float) -> None:
    report = served(poisson(utilization), cluster(tmp_path, *GROUPS, profile=SLOW))
    assert report.completed == 200
    assert report.ttft_error.p50 is not None and report.ttft_error.p50 < 0.1
    assert report.ttft_error.p90 is not None and report.ttft_error.p90 < 0.2


def test_tbt_is_predicted_under_steady_load(tmp_path: Path) -> None:
    report = served(poisson(0.5), cluster(tmp_path, *GROUPS, profile=SLOW))
    assert report.tbt_error.p90 is not None and report.tbt_error.p90 < 0.2
