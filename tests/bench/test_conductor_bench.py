"""`perigee bench conductor`, in a small cluster: what it measures is there, and what it cannot do it says."""

import json

import pytest

from perigee.bench.conductor import ConductorBenchConfig, run
from perigee.bench.conductor_load import Scene
from perigee.bench.errors import BenchError
from perigee.scheduler.policies import make_policies


def test_all_figures_are_given_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ConductorBenchConfig(workers=8, blocks=20_000, decisions=20, json_file="-")) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"decision_p99_ms", "decisions_per_s", "block_events_per_s", "bytes_per_block"} <= figures.keys()
    assert all(figure > 0 for key, figure in figures.items() if key != "bytes_per_block")


def test_requests_come_to_their_end_and_the_load_is_steady() -> None:
    scene = Scene(8, make_policies())
    scene.fill(2000)
    scene.decide(24, 300)
    before = scene.num_in_flight
    assert 0 < before < 300
    scene.decide(24, 300)
    assert scene.num_in_flight == pytest.approx(before, rel=0.5)


def test_a_policy_that_is_not_known_is_refused() -> None:
    with pytest.raises(BenchError, match="--placement: 'best' given, allowed are perigee, global-cache"):
        run(ConductorBenchConfig(placement="best"))
