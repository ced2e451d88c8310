"""`perigee profile` against clusters that run."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from perigee.scheduler.cost.profile_file import ProfileFile, read_profile
from tests.cluster import cluster
from tests.e2e.conftest import up
from tests.e2e.endpoint import Endpoint, Vocabulary

SECRET = {"PERIGEE_CLUSTER_SECRET": "of this test's cluster alone"}
FLAGS = ("--max-tokens=256", "--repeats=1", "--seconds=1", "--machine=two cores", "--date=today")


@dataclass(frozen=True, slots=True)
class Profiled:
    """What came of a run: the file, and the JSON with the samples."""

    path: Path
    document: Any

    @property
    def read(self) -> ProfileFile:
        return read_profile(self.path)


def profile(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "perigee", "profile", *FLAGS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **SECRET})


def measured(url: str, path: Path, *arguments: str) -> Profiled:
    ended = profile(f"--url={url}", f"--output={path}", "--json=-", *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Profiled(path, json.loads(ended.stdout))


@pytest.fixture(scope="module")
def profiled(tiny: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    return measured(tiny.url, tmp_path_factory.mktemp("profiled") / "profile.yaml")


@pytest.fixture(scope="module")
def two_nodes(tiny_llama: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*next(iter(SECRET.items())))
        with up(tmp_path_factory.mktemp("nodes"), tiny_llama, vocabulary, "--nodes=2") as endpoint:
            yield endpoint


def test_a_profile_says_what_was_measured_where_and_how_well_it_fits(profiled: Profiled, tiny: Endpoint) -> None:
    origin = profiled.read.origin
    assert (origin.method, origin.model, origin.machine, origin.date) == ("measured", tiny.model, "two cores", "today")
    assert origin.residuals.keys() == {"prefill", "load", "step"}
    assert origin.notes == ["transfer: not measured, all workers are at one store node"]


def test_a_profile_predicts_what_was_measured(profiled: Profiled) -> None:
    assert profiled.read.profile.prefill_s(256, 0) > 0
    assert profiled.read.profile.step_s(1, 64) > 0


def test_json_holds_the_profile_and_every_sample(profiled: Profiled) -> None:
    assert profiled.document["cost"] == profiled.read.cost
    samples = profiled.document["samples"]
    assert {(each["new_tokens"], each["prefix_tokens"]) for each in samples["prefills"]} == {
        *((32, 0), (128, 0), (256, 0)),
        *((32, 64), (128, 64), (32, 128), (128, 128)),
    }
    assert {each["tokens"] for each in samples["loads"]} == {0, 64, 128}
    assert {each["batch"] for each in samples["steps"]} == {1, 2, 4, 8, 16, 32}


async def test_measuring_leaves_nothing_behind(profiled: Profiled, tiny: Endpoint) -> None:
    await tiny.until_at_rest()
    assert await tiny.metric("perigee_orphaned_blocks") == 0


@pytest.mark.slow
def test_pulling_from_another_node_is_measured_where_there_is_one(two_nodes: Endpoint, tmp_path: Path) -> None:
    # Several rounds, for a pull whose measurement was disturbed may count for nothing.
    rounds = ("--repeats=4", "--seconds=20")
    origin = measured(two_nodes.url, tmp_path / "profile.yaml", *rounds).read.origin
    assert origin.residuals["transfer"].samples >= 2
    assert origin.notes == []


@pytest.mark.slow
def test_a_cluster_starts_from_its_profile(profiled: Profiled, tiny_llama: Path, tmp_path: Path) -> None:
    with cluster(tmp_path, f"--model={tiny_llama}", f"--profile={profiled.path}") as started:
        started.wait_ready()
        assert "cost model method='measured' model='tiny'" in started.log.read_text()


def test_without_a_cluster_there_is_nothing_to_measure(tmp_path: Path) -> None:
    ended = profile("--url=http://127.0.0.1:9", f"--output={tmp_path / 'profile.yaml'}")
    assert ended.returncode == 1
    assert ended.stderr.startswith("perigee profile: url: no answer from http://127.0.0.1:9/cluster")


def computed_tokens(endpoint: Endpoint) -> float:
    """Prompt tokens that all workers have computed."""
    text = urllib.request.urlopen(f"{endpoint.url}/metrics").read().decode()
    lines = [line for line in text.splitlines() if line.startswith("perigee_worker_prompt_tokens_computed_total")]
    return sum(float(line.split()[-1]) for line in lines)


def test_decoding_can_be_measured_beside_workers_that_compute(tiny: Endpoint, tmp_path: Path) -> None:
    begun = computed_tokens(tiny)
    measured(tiny.url, tmp_path / "quiet.yaml")
    quiet = computed_tokens(tiny)
    ended = profile(f"--url={tiny.url}", f"--output={tmp_path / 'busy.yaml'}", "--busy")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert computed_tokens(tiny) - quiet > 1.5 * (quiet - begun)
