"""A recorded Conductor is lived through again from its file, and says the same, or what it would have said."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from perigee.replay.relive import relive
from perigee.replay.relive_command import ReplayLogConfig, run
from perigee.scheduler.commands import Command
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.errors import InvalidRecording
from perigee.scheduler.events import Event, Tick
from perigee.scheduler.policies import PolicyNames, make_policies
from perigee.scheduler.recording.eventlog import Header, Record
from perigee.scheduler.recording.files import Recorder
from tests.scheduler.cluster import PROFILE, Cluster, keys

Replay = Callable[..., tuple[int, dict[str, Any]]]

PLACEMENT, ADMISSION = "perigee", "perigee"
HEADER = Header(PolicyNames(PLACEMENT, ADMISSION), PROFILE, "0")


class Recorded(Cluster):
    """A cluster whose Conductor's life is written down."""

    def __init__(self, path: Path, header: Header = HEADER) -> None:
        super().__init__()
        weights = header.tenant_weights
        self.conductor = Conductor(make_policies(PLACEMENT, ADMISSION), PROFILE, tenant_weights=weights)
        self.recorder = Recorder(path, header, 1 << 20)
        self.records: list[Record] = []

    def hear(self, event: Event) -> list[Command]:
        commands = super().hear(event)
        self.recorder.take(event, self.now, commands)
        self.records.append(Record(self.now, event, tuple(commands)))
        return commands


def live(cluster: Recorded) -> None:
    """Writes down `happenings`, to the end."""
    try:
        happenings(cluster)
    finally:
        cluster.recorder.close()


def happenings(cluster: Cluster) -> None:
    """Two requests that are served, the second after its worker fails, and one that is turned away."""
    cluster.add_store(held=keys(64))
    cluster.add_worker("p0", "prefill")
    cluster.add_worker("p1", "prefill")
    cluster.add_worker("d0", "decode", max_sequences=2)
    for request_id in ("r", "s"):
        cluster.now += 0.1
        cluster.dispatch(request_id)
    cluster.reject("t")
    cluster.prefill_done("r", compute_s=0.1, ttft_s=0.3)
    cluster.now += 0.7
    cluster.fail("s", "p1")
    cluster.dispatch("s", attempt=1)
    cluster.finish("r")
    cluster.hear(Tick())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    live(Recorded(tmp_path / "log"))
    return tmp_path / "log"


@pytest.fixture
def replayed(capsys: pytest.CaptureFixture[str]) -> Replay:
    def replay(path: Path, **options: str) -> tuple[int, dict[str, Any]]:
        status = run(ReplayLogConfig(recording=path, json_file="-", **options))
        return status, json.loads(capsys.readouterr().out)

    return replay


def test_a_recording_is_replayed_with_the_same_commands(log: Path, replayed: Replay) -> None:
    status, result = replayed(log)
    assert (status, result["identical"], result["difference"], result["others"]) == (0, True, None, None)
    assert result["commands"] == {"Dispatch": 3, "Reject": 1, "Proceed": 1}
    assert result["events"]["RequestArrived"] == 4
    assert result["policies"] == asdict(HEADER.policies)
    assert result["span_s"] == pytest.approx(0.9)


def test_the_part_that_a_kill_left_is_replayed(log: Path, replayed: Replay) -> None:
    log.write_bytes(log.read_bytes()[:-40])
    status, result = replayed(log)
    assert (status, result["identical"]) == (0, True)
    assert 0 < sum(result["events"].values()) < 20


def test_what_tenants_weigh_is_recorded(tmp_path: Path, replayed: Replay) -> None:
    weighed = Recorded(tmp_path / "log", replace(HEADER, tenant_weights={"": 4.0}))
    live(weighed)
    assert replayed(tmp_path / "log")[1]["identical"]
    assert relive(HEADER, weighed.records).difference is not None


def test_the_first_other_command_is_shown(tmp_path: Path, replayed: Replay) -> None:
    live(Recorded(tmp_path / "log", replace(HEADER, profile=CostProfile())))
    status, result = replayed(tmp_path / "log")
    assert (status, result["identical"]) == (1, False)
    difference = result["difference"]
    assert difference["event"].startswith("RequestArrived(") and "Ref(request_id='r'" in difference["event"]
    assert difference["recorded"] != difference["now_said"]
    assert difference["event_number"] == sum(result["events"].values())


def test_other_policies_are_asked_what_they_would_have_done(log: Path, replayed: Replay) -> None:
    status, result = replayed(log, admission="none")
    others = result["others"]
    assert (status, result["identical"]) == (0, True)
    assert (others["placement"], others["admission"]) == (PLACEMENT, "none")
    assert (others["arrivals"], others["both_dispatched"], others["rejections_avoided"]) == (4, 3, 1)
    assert (others["agreement"], others["mean_ttft_difference_s"]) == (0.75, 0.0)


def test_what_is_printed_says_how_it_went(log: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(ReplayLogConfig(recording=log, admission="none", json_file=str(tmp_path / "json"))) == 0
    printed = capsys.readouterr().out
    assert "identical: all 5 commands to" in printed
    assert "75.0% of 4" in printed
    assert json.loads((tmp_path / "json").read_text())["identical"] is True


def test_policies_that_are_gone_are_named() -> None:
    header = replace(HEADER, policies=PolicyNames("astrology", ADMISSION))
    with pytest.raises(InvalidRecording, match=r"policies.placement: is 'astrology', allowed are "):
        relive(header, [])


def test_an_empty_file_has_no_header(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    with pytest.raises(InvalidRecording, match="has no header"):
        run(ReplayLogConfig(recording=tmp_path / "log"))
