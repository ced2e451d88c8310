"""`perigee paper`: every figure that it promises, from whatever the trials came to."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from perigee.replay.errors import ReplayError
from perigee.replay.metrics import Outcome, RequestRecord
from perigee.replay.paper.clusters import mooncake
from perigee.replay.paper.command import PaperConfig, run
from perigee.replay.paper.entry import entry
from perigee.replay.paper.lab import Lab, Result, Trial
from perigee.replay.paper.published import PUBLISHED
from perigee.replay.series import Sample
from perigee.replay.simulator.simulation import Simulated

IDS = {
    *(f"fig1.gain.{tbt}ms" for tbt in (100, 200, 300)),
    *(f"fig5.{name}" for name in ("global_cache_aware", "local_cache_aware", "load_balancing", "random")),
    *(f"fig9.conversation.{size}M" for size in (1, 3, 10, 30, 50)),
    "fig10.hit_gain",
    *(f"fig13.{gbps}gbps" for gbps in (24, 100, 200, 400)),
    "fig15.best_prefill_nodes",
    *(f"overload.{name}" for name in ("at_decode", "early", "prediction")),
    *(f"ours.goodput_gain.{part}" for part in ("placement", "admission", "both")),
}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two prompts that share a block."""
    rows = (
        {"timestamp": 1000 * row, "input_length": 1024, "output_length": 8, "hash_ids": [0, row + 1]} for row in (0, 1)
    )
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def came_to(trial: Trial) -> Result:
    """A result that depends on the trial: more prefill nodes, shorter TTFT."""
    ttft_s = 10.0 / trial.cluster.nodes[0].count / trial.speed
    records = [
        RequestRecord(Outcome.COMPLETED, 0.0, 0.0, 9.0, 1024, 512, 8, ttft_s, 0.05),
        RequestRecord(Outcome.REJECTED, 1.0, 1.0, 1.0),
    ]
    samples = [Sample(float(at), 1, at, at, 1, 0, 0, 1.0, 0.1 * at, 1) for at in range(3)]
    return Result(Simulated(tuple(records), tuple(samples)))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials come to what `came_to` says, instead of being simulated for minutes."""

    def run_scripted(self: Lab, trials: Iterable[Trial], done: Callable[[], None]) -> None:
        self._results.update({trial: came_to(trial) for trial in trials})

    monkeypatch.setattr(Lab, "run", run_scripted)


def test_every_figure_is_told_beside_the_published_one(scripted: None, trace: Path, tmp_path: Path) -> None:
    json_file, html = tmp_path / "paper.json", tmp_path / "paper.html"
    assert run(PaperConfig(trace=trace, json_file=str(json_file), html=str(html))) == 0
    experiments = {each["id"]: each for each in json.loads(json_file.read_text())["experiments"]}
    assert experiments.keys() >= IDS
    assert all(each.keys() == {"id", "what", "unit", "paper", "ours", "why"} for each in experiments.values())
    assert {name: experiments[name]["paper"] for name in PUBLISHED} == PUBLISHED
    assert experiments["fig9.conversation.50M"]["ours"] == 0.25  # one of four blocks was there already
    assert experiments["fig5.random"]["ours"] == 1.25
    page = html.read_text()
    assert "Figure 5" in page and "<svg" in page and "http" not in page.replace("http://www.w3.org", "")


def test_what_is_far_from_the_paper_says_why(scripted: None, trace: Path, tmp_path: Path) -> None:
    json_file = tmp_path / "paper.json"
    run(PaperConfig(trace=trace, json_file=str(json_file)))
    for each in json.loads(json_file.read_text())["experiments"]:
        explained = each["id"].startswith(("fig1.gain.", "fig5.", "fig10.hit", "overload."))
        if each["paper"] and explained and not 0.5 <= each["ours"] / each["paper"] <= 2:
            assert each["why"], each["id"]


def test_a_figure_is_far_if_it_differs_by_more_than_a_factor_of_two_or_in_direction() -> None:
    assert not entry("fig5.random", "", "s", 19.65 / 2).is_far
    assert entry("fig5.random", "", "s", 9.0).is_far
    assert entry("fig1.gain.300ms", "", "%", -59.0).is_far
    assert not entry("fig13.24gbps", "", "s", 1.0).is_far  # the paper gives no number


def test_a_trial_is_simulated_once_however_often_it_is_asked_for(trace: Path) -> None:
    lab, done = Lab(trace), []
    trial = Trial(mooncake(1, 1))
    lab.run([trial, Trial(mooncake(1, 1))], lambda: done.append(1))
    lab.run([trial], lambda: done.append(1))
    assert len(done) == 1
    assert lab[trial].report().completed == 2
    assert lab[trial].capacity(30.0, 1.0) == 1.0


def test_without_a_trace_the_error_names_it(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match=r"missing\.jsonl"):
        run(PaperConfig(trace=tmp_path / "missing.jsonl"))
