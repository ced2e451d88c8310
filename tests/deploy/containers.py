"""What the deployment files say that each container runs, and the same as plain processes of this machine.

A container gets a loopback address of its own and a folder for each of its volumes; names of hosts and paths in its
command line and environment are replaced by those.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.redis_server import binary_folder

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = DEPLOY / "docker-compose.yml"
MANIFESTS = sorted(path for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
NODES = ("node-a", "node-b")


@dataclass(frozen=True)
class Container:
    """`mounts` are the paths inside, with the folder outside, relative to that of the test. `hosts` it is known by."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    mounts: Mapping[str, str]
    hosts: Sequence[str]


def of_compose(variables: Mapping[str, str]) -> list[Container]:
    document = yaml.safe_load(_interpolated(COMPOSE.read_text(), variables))
    return [_of_service(name, service) for name, service in document["services"].items()]


def _interpolated(text: str, variables: Mapping[str, str]) -> str:
    """Compose's own rules for variables, as far as the file uses them."""

    def value(match: re.Match[str]) -> str:
        return variables.get(match["name"], match["default"]) if match["name"] else "$"

    return re.sub(r"\$(?:\$|\{(?P<name>\w+):-(?P<default>[^}]*)\})", value, text)


def _of_service(name: str, service: dict[str, Any]) -> Container:
    volumes = [volume.split(":") for volume in service.get("volumes", [])]
    mounts = {inside: f"volumes/{outside}" for outside, inside, *_ in volumes} | {"/run/secrets": "secrets"}
    environment = service.get("environment", {})
    return Container(name, _with_entrypoint(service["image"], service["command"]), environment, mounts, [name])


def manifests() -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def of_kubernetes() -> list[Container]:
    """Each pod on each node that it would be on: stores and workers on both, all else on the first."""
    controllers = [document for document in manifests() if document["kind"] in ("Deployment", "DaemonSet")]
    return [_of_pod(document, node) for document in controllers for node in _placed(document["spec"])]


def _placed(spec: dict[str, Any]) -> Sequence[str]:
    return NODES if "nodeSelector" in spec["template"]["spec"] else NODES[:1]


def _of_pod(document: dict[str, Any], node: str) -> Container:
    name, pod = document["metadata"]["name"], document["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    pod_name = f"{name}-{node}"
    fields = {"spec.nodeName": node, "metadata.name": pod_name, "status.podIP": pod_name}
    environment = {
        each["name"]: each["value"] if "value" in each else fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
        for each in container.get("env", [])
    }
    words = container.get("command", []) + container["args"]
    command = [re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word) for word in words]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {
        mount["mountPath"]: _folder(volumes[mount["name"]], mount, pod_name, node)
        for mount in container["volumeMounts"]
    }
    return Container(pod_name, _with_entrypoint(container["image"], command), environment, mounts, [name, pod_name])


def _folder(volume: dict[str, Any], mount: dict[str, Any], pod_name: str, node: str) -> str:
    if "secret" in volume:
        return "secrets"
    if "hostPath" in volume:
        path = volume["hostPath"]["path"]
        return f"hosts/{node}{path}/{mount['subPath']}" if "subPath" in mount else f"hosts/{node}{path}"
    return f"pods/{pod_name}/{volume['name']}"


def _with_entrypoint(image: str, command: Sequence[str]) -> list[str]:
    """Our image begins every command with `perigee`."""
    return [sys.executable, "-m", "perigee", *command] if image.startswith("perigee:") else list(command)


@dataclass
class Machine:
    """Runs containers as processes, with their files under `folder`. All that they say goes to `log`."""

    folder: Path
    containers: list[Container]
    replacements: Mapping[str, str]
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def address(self, host: str) -> str:
        """Of the first container that is known by this name."""
        numbers = [number for number, container in enumerate(self.containers, 1) if host in container.hosts]
        return f"127.{1 + os.getpid() % 250}.{1 + os.getpid() // 250 % 250}.{numbers[0]}"

    def start(self, container: Container) -> None:
        inside = {path: self.folder / outside for path, outside in container.mounts.items()}
        for folder in inside.values():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        environment = {"PATH": f"{binary_folder()}:{os.environ['PATH']}", "HOME": str(self.folder)}
        environment["OMP_NUM_THREADS"] = "1"  # of many that share a few cores
        for name, value in container.environment.items():
            environment[name] = self._translated(value, container, inside)
        with self.log.open("ab") as log:
            self.processes[container.name] = subprocess.Popen(
                [
                    container.command[0],  # our interpreter, wherever this checkout lies
                    *(self._translated(word, container, inside) for word in container.command[1:]),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes.pop(name).wait()

    def assert_all_run(self) -> None:
        ended = {name: process.returncode for name, process in self.processes.items() if process.poll() is not None}
        assert not ended, f"{ended}\n{self.log.read_text()}"

    def end(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            process.wait()

    def _translated(self, word: str, container: Container, inside: Mapping[str, Path]) -> str:
        paths = "|".join(map(re.escape, sorted(inside, key=len, reverse=True))) or "$^"
        word = re.sub(rf"(?<![\w/])(?:{paths})(?=/|$)", lambda match: str(inside[match[0]]), word)
        word = word.replace("0.0.0.0", self.address(container.name))
        for host in {host for each in self.containers for host in each.hosts}:
            # A host stands before a port, and alone where a process says how others reach it.
            word = re.sub(rf"(?<![\w.-]){host}(?=:\d)|(?<=--advertise=){host}$", self.address(host), word)
        for old, new in self.replacements.items():
            word = word.replace(old, new)
        return word


@contextmanager
def started(folder: Path, containers: list[Container], replacements: Mapping[str, str]) -> Iterator[Machine]:
    """All containers, in the files' order, ended afterwards."""
    machine = Machine(folder, containers, replacements)
    try:
        for container in containers:
            machine.start(container)
        yield machine
    finally:
        machine.end()
