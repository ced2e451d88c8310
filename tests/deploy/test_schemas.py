"""The deployment files say what their formats allow, and what a careful reader expects of every container."""

import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.containers import COMPOSE, MANIFESTS, manifests


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


def test_containers_of_compose_have_no_more_rights_than_they_need() -> None:
    for name, service in yaml.safe_load(COMPOSE.read_text())["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["healthcheck"], name
        assert ("ports" in service) == (name == "server"), name
