"""What balance is worth: the same trace on the same simulated cluster, with it and without."""

from pathlib import Path

from perigee.replay.metrics import Outcome, Report, Slo, summarize
from perigee.replay.simulator.simulation import Simulation
from perigee.replay.trace import TraceRequest
from tests.replay.simulator.clusters import DECODE, PREFILL, cluster, request

SLO = Slo(5.0, 0.5)
PHASE_S = 60
RATE = 4.0

LONG_PROMPTS = (1000, 4)  # a second of prefill, and hardly any decoding
LONG_ANSWERS = (64, 400)


def shifting_trace() -> list[TraceRequest]:
    """Long prompts with short answers, then short prompts with long answers: each more than half the cluster can do."""
    count = int(RATE * PHASE_S)
    shapes = [LONG_PROMPTS] * count + [LONG_ANSWERS] * count
    return [request(index / RATE, *shape, first_id=1000 * index) for index, shape in enumerate(shapes)]


def served(folder: Path, balance: str) -> tuple[Report, Simulation]:
    nodes = [{**PREFILL, "count": 3, "chunk_tokens": 1024}, {**DECODE, "count": 3}]
    folder.mkdir()
    made = cluster(
        folder,
        *nodes,
        balance=balance,
        role_hold_s=3.0,
        admission="perigee",
        slo_ttft_s=SLO.ttft_s,
        slo_tbt_s=SLO.tbt_s,
    )
    simulation = Simulation(made)
    simulated = simulation.run(shifting_trace())
    assert all(record.outcome in (Outcome.COMPLETED, Outcome.REJECTED) for record in simulated.records)
    assert len(simulated.records) == len(shifting_trace())
    return summarize(simulated.records, SLO), simulation


def test_switching_roles_serves_more_of_a_load_that_changes_and_loses_nothing(tmp_path: Path) -> None:
    fixed, _ = served(tmp_path / "fixed", "none")
    switching, simulation = served(tmp_path / "switching", "roles")
    assert switching.failed == fixed.failed == 0
    assert switching.goodput_per_s > 1.1 * fixed.goodput_per_s
    counts = simulation.control.conductor.view.move_counts
    assert 2 <= counts.role_changes == counts.drains <= 8
