"""`perigee up`: that it answers, and that nothing of it outlives it, however it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster import Cluster, cluster

pytestmark = pytest.mark.slow  # each starts a cluster of its own

NAMES = ["conductor", "decode-0", "prefill-0", "server", "store-0"]


@pytest.fixture
def starting(tiny_llama: Path, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster whose processes were started a moment ago and are still on their way."""
    # However slow the machine, each has time to end by itself.
    flags = (f"--model={tiny_llama}", "--served-model-name=tiny", "--dtype=float32", "--grace-s=50")
    with cluster(tmp_path, *flags) as started:
        wait_started(started)
        yield started


def wait_started(started: Cluster) -> None:
    """Waits until the supervisor has said that all children are started."""
    while started.log.read_text().count("child started") < len(NAMES):
        assert started.process.poll() is None, started.log.read_text()
        time.sleep(0.02)


def assert_nothing_is_left(started: Cluster, children: dict[str, psutil.Process]) -> None:
    _, alive = psutil.wait_procs(list(children.values()), timeout=60)
    assert not alive
    assert [path.name for path in started.temporary.iterdir()] == [started.log.name]


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.load(response)


def complete(url: str, model: str, prompt: str) -> Any:
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_a_cluster_says_that_it_is_ready_answers_and_ends_when_told(starting: Cluster) -> None:
    children = starting.children()
    url = starting.wait_ready()
    assert sorted(children) == NAMES
    assert get(f"{url}/v1/models")["data"][0]["id"] == "tiny"
    answer = complete(url, "tiny", "The perigee of an orbit is")
    assert answer["usage"]["completion_tokens"] == 8
    state = get(f"{url}/cluster")
    assert {worker["id"]: worker["pid"] for worker in state["workers"]} == {
        name: children[name].pid for name in ("decode-0", "prefill-0")
    }
    assert starting.end(signal.SIGTERM) == 0
    assert_nothing_is_left(starting, children)
    log = starting.log.read_text()
    assert "Traceback" not in log
    assert "killed" not in log


def test_a_cluster_is_ready_only_with_all_its_workers(tiny_llama: Path, tmp_path: Path) -> None:
    flags = (f"--model={tiny_llama}", "--dtype=float32", "--prefill=2", "--decode=2")
    with cluster(tmp_path, *flags) as started:
        url = started.wait_ready()
        workers = {worker["id"]: worker["role"] for worker in get(f"{url}/cluster")["workers"]}
    assert workers == {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode"}


def test_nothing_outlives_a_supervisor_that_was_killed(starting: Cluster) -> None:
    children = starting.children()
    starting.wait_ready()
    assert starting.end(signal.SIGKILL) == -signal.SIGKILL
    assert_nothing_is_left(starting, children)


def test_a_cluster_that_is_ready_ends_with_its_decode_worker(starting: Cluster) -> None:
    children = starting.children()
    starting.wait_ready()
    children["decode-0"].kill()
    assert starting.process.wait(60) == 1
    assert "decode-0 was killed by SIGKILL" in starting.log.read_text()
    assert_nothing_is_left(starting, children)


@pytest.mark.parametrize("name", NAMES)
def test_the_death_of_any_child_ends_a_cluster_that_is_starting(starting: Cluster, name: str) -> None:
    children = starting.children()
    children[name].kill()
    assert starting.process.wait(60) == 1
    assert f"{name} was killed by SIGKILL" in starting.log.read_text()
    assert_nothing_is_left(starting, children)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_cluster_that_is_starting_ends_when_told(starting: Cluster, number: signal.Signals) -> None:
    children = starting.children()
    assert starting.end(number) == 0
    assert_nothing_is_left(starting, children)


def test_nothing_outlives_a_supervisor_that_was_killed_while_starting(starting: Cluster) -> None:
    children = starting.children()
    starting.end(signal.SIGKILL)
    assert_nothing_is_left(starting, children)


def test_the_children_do_not_get_the_terminal_s_interrupt(starting: Cluster) -> None:
    assert os.getpgid(starting.process.pid) not in {os.getpgid(child.pid) for child in starting.children().values()}


def test_a_directory_that_nobody_could_remove_goes_at_the_next_start(tiny_llama: Path, tmp_path: Path) -> None:
    abandoned = tmp_path / "perigee-up-abandoned"
    abandoned.mkdir()
    (abandoned / "conductor.sock").touch()
    os.utime(abandoned, (0, 0))
    with cluster(tmp_path, f"--model={tiny_llama}") as started:
        wait_started(started)
        assert not abandoned.exists()


def test_the_directory_of_a_running_cluster_stays_at_the_next_start(starting: Cluster, tiny_llama: Path) -> None:
    (running,) = starting.temporary.glob("perigee-up-*")
    os.utime(running, (0, 0))
    with cluster(starting.temporary, f"--model={tiny_llama}") as started:
        wait_started(started)
        assert running.exists()


def refused(*arguments: str, code: int = 2) -> list[str]:
    """What `perigee up` says before it ends with `code`, having started nothing."""
    command = [sys.executable, "-m", "perigee", "up", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (code, "")
    return ended.stderr.splitlines()


def test_a_port_that_is_taken_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(f"--port={port}") == [
            f"perigee: --port: {port} on 127.0.0.1 is taken by another process; allowed are free ports, or 0 for any"
        ]


def test_a_model_that_is_not_there_is_refused_before_anything_starts() -> None:
    (problem,) = refused("--port=0", "--model=/nowhere")
    assert problem.startswith("perigee: --model: '/nowhere' does not exist; allowed are")


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--api-keys-file", "'/nowhere/file' cannot be read: "),
        ("--record", "'/nowhere/file' cannot be written; allowed is a file in a folder that can"),
        ("--receipts-file", "'/nowhere/file' cannot be written; allowed is a file in a folder that can"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_anything_starts(
    flag: str, complaint: str, tiny_llama: Path
) -> None:
    (problem,) = refused("--port=0", f"--model={tiny_llama}", "--dtype=float32", f"{flag}=/nowhere/file")
    assert problem.startswith(f"perigee: {flag}: {complaint}")


def test_strangers_need_keys() -> None:
    (problem,) = refused("--port=0", "--host=0.0.0.0")
    assert "api_keys_file" in problem


def test_each_wrong_flag_gets_its_own_line() -> None:
    assert refused("--prefill=0", "--dtype=fp8", "--block-tokens=48", "--dram-bytes=lots") == [
        "perigee: --prefill: '0': Input should be greater than or equal to 1",
        "perigee: --dtype: 'fp8': Input should be 'float32' or 'bfloat16'",
        "perigee: --block-tokens: '48': allowed are powers of two",
        "perigee: --dram-bytes: 'lots': could not parse value and unit from byte string",
    ]
