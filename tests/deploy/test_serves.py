"""What the deployment files describe, run as processes on this machine, serves."""

import json
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.containers import DEPLOY, Machine, of_compose, of_kubernetes, started

pytestmark = pytest.mark.slow  # each starts a cluster of its own

MODEL = "smollm2-135m-instruct"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, for paths of Unix sockets are. With the secrets of a new deployment."""
    with tempfile.TemporaryDirectory(prefix="deploy-") as path:
        subprocess.run([DEPLOY / "make-secrets.sh", f"{path}/secrets"], check=True)
        yield Path(path)


@pytest.fixture(params=["compose", "kubernetes"])
def machine(request: pytest.FixtureRequest, folder: Path, tiny_llama: Path) -> Iterator[Machine]:
    if request.param == "compose":
        sizes = {"PERIGEE_DRAM_BYTES": "64MiB", "PERIGEE_SSD_BYTES": "64MiB"}
        variables = {"PERIGEE_MODEL": str(tiny_llama), "PERIGEE_DTYPE": "float32", **sizes}
        containers, replacements = of_compose(variables), {}
    else:
        containers = of_kubernetes()
        replacements = {
            f"--model={MODEL}": f"--model={tiny_llama}",
            "--dtype=bfloat16": "--dtype=float32",
            "--dram-bytes=4GiB": "--dram-bytes=64MiB",
            "--ssd-bytes=16GiB": "--ssd-bytes=64MiB",
        }
    with started(folder, containers, replacements) as machine:
        yield machine


def test_the_containers_of_a_deployment_serve_together(machine: Machine) -> None:
    wait_until(machine, lambda: len(cluster(machine)["workers"]) == 4 and call(machine, "/health")["status"] == "ok")
    state = cluster(machine)
    assert sorted(store["id"] for store in state["stores"]) == ["node-a", "node-b"]
    assert sorted(worker["role"] for worker in state["workers"]) == ["decode", "decode", "prefill", "prefill"]
    wait_until(machine, lambda: all(store["load"]["ssd_state"] == "SSD_ON" for store in cluster(machine)["stores"]))
    answer = complete(machine)
    assert answer["usage"]["completion_tokens"] == 8
    with pytest.raises(urllib.error.HTTPError, match="401"):
        call(machine, "/v1/models", key="wrong")
    machine.kill(next(name for name in machine.processes if name.startswith("redis")))
    assert complete(machine)["choices"] == answer["choices"]
    assert len(cluster(machine)["workers"]) == 4
    machine.assert_all_run()


def wait_until(machine: Machine, condition: Any) -> None:
    """Of other processes there is no event to await."""
    while True:
        machine.assert_all_run()
        try:
            if condition():
                return
        except (OSError, KeyError):
            pass
        time.sleep(0.1)


def cluster(machine: Machine) -> Any:
    return call(machine, "/cluster")


def complete(machine: Machine) -> Any:
    model = call(machine, "/v1/models")["data"][0]["id"]
    body = {"model": model, "prompt": "The perigee of an orbit is", "max_tokens": 8, "temperature": 0}
    return call(machine, "/v1/completions", {**body, "ignore_eos": True})


def call(machine: Machine, path: str, body: dict[str, Any] | None = None, key: str | None = None) -> Any:
    key = key or (machine.folder / "secrets" / "api_keys").read_text().strip().partition(":")[2]
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    url = f"http://{machine.address('server')}:8000{path}"
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
