"""The deployment files say what their formats allow, and what a careful reader expects of every container."""

import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from perigee.workers.config import WorkerConfig
from tests.deploy.containers import COMPOSE, MANIFESTS, manifests

_FAREWELL_S = 2  # of a server, for errors to go out
_DRAIN_S = WorkerConfig.model_fields["drain_s"].default


def compose_validator() -> jsonschema.Draft201909Validator:
    """Of the compose specification's schema, as the package that carries it has it; its code is not imported."""
    path = Path(str(distribution("docker-compose").locate_file("compose/config/compose_spec.json")))
    return jsonschema.Draft201909Validator(json.loads(path.read_text()))


def test_the_compose_file_follows_the_compose_specification() -> None:
    document = yaml.safe_load(COMPOSE.read_text())
    compose_validator().validate(document)


def test_the_schema_would_refuse_what_compose_does_not_know() -> None:
    document = yaml.safe_load(COMPOSE.read_text())
    document["services"]["server"]["healthcheck"]["tset"] = "true"
    with pytest.raises(jsonschema.ValidationError, match="tset"):
        compose_validator().validate(document)


@pytest.mark.parametrize(
    "document", manifests(), ids=lambda document: f"{document['kind']}-{document['metadata']['name']}"
)
def test_manifests_follow_kubernetes_schemas(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_kustomization_names_every_manifest() -> None:
    kustomization = yaml.safe_load((MANIFESTS[0].parent / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == [path.name for path in MANIFESTS]


def test_the_kustomization_says_where_the_manifests_image_comes_from() -> None:
    kustomization = yaml.safe_load((MANIFESTS[0].parent / "kustomization.yaml").read_text())
    (renamed,) = kustomization["images"]
    ours = [image for pod in pods() for image in images(pod.values[0]) if image.partition(":")[0] == renamed["name"]]
    assert len(ours) == 6  # of the Conductor, the server, two roles of workers, and the store node with its folders


def images(pod: dict[str, Any]) -> list[str]:
    return [container["image"] for container in [*pod.get("initContainers", []), *pod["containers"]]]


def pods() -> list[Any]:
    controllers = [document for document in manifests() if document["kind"] in ("Deployment", "DaemonSet")]
    return [pytest.param(each["spec"]["template"]["spec"], id=each["metadata"]["name"]) for each in controllers]


@pytest.mark.parametrize("pod", pods())
def test_containers_in_kubernetes_have_no_more_rights_than_they_need(pod: dict[str, Any]) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsUser"] > 0
    for container in pod["containers"]:
        rights = pod["securityContext"] | container["securityContext"]
        assert rights["runAsNonRoot"] is True
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert {"readinessProbe", "livenessProbe", "resources"} <= container.keys()


@pytest.mark.parametrize("pod", pods())
def test_pods_have_time_to_end_what_they_have(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    before_s = int(container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["", 0])[1])
    assert before_s + needed_s(container["args"]) < pod.get("terminationGracePeriodSeconds", 30)


def test_containers_of_compose_have_time_to_end_what_they_have() -> None:
    for name, service in yaml.safe_load(COMPOSE.read_text())["services"].items():
        given_s = int(service.get("stop_grace_period", "10s").removesuffix("s"))
        assert needed_s(service["command"]) < given_s, name


def needed_s(command: list[str]) -> float:
    """How long what runs this goes on after it was told to end."""
    grace = [float(word.partition("=")[2]) for word in command if word.startswith("--shutdown-grace-s=")]
    return grace[0] + _FAREWELL_S if grace else _DRAIN_S if command[0] == "worker" else 0


def test_workers_leave_the_cores_of_others_alone() -> None:
    """In Kubernetes they use what they request."""
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    composed = [service for service in services.values() if service["command"][0] == "worker"]
    assert len(composed) == 4
    for service in composed:
        assert service["environment"]["OMP_WAIT_POLICY"] == "passive"
        assert any(word.startswith("--threads=") for word in service["command"])
    podded = [pod.values[0]["containers"][0] for pod in pods() if pod.id in ("prefill", "decode")]
    for container in podded:
        assert {"name": "OMP_WAIT_POLICY", "value": "passive"} in container["env"]
        assert f"--threads={container['resources']['requests']['cpu']}" in container["args"]


def test_containers_of_compose_have_no_more_rights_than_they_need() -> None:
    for name, service in yaml.safe_load(COMPOSE.read_text())["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["healthcheck"], name
        assert ("ports" in service) == (name == "server"), name
