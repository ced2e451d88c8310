"""What a client may ask for beside its text, and what the Conductor is told of it."""

from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError

from perigee.scheduler import scheduler_pb2 as pb
from perigee.server.config import ServerConfig
from perigee.server.tenants import KeysFileError, Tenants
from tests.server.conftest import Cluster, fronted
from tests.server.fakes import reject


async def told(cluster: Cluster, api_key: str = "none", **extra: object) -> pb.RequestArrived:
    """What the Conductor hears of a request with these fields."""
    cluster.answers("a")
    async with cluster.client(api_key=api_key) as client:
        await client.completions.create(model="tiny", prompt="b", max_tokens=1, extra_body=extra)
    return cluster.conductor.events("arrived")[-1].arrived


def said(error: APIStatusError) -> dict[str, Any]:
    """OpenAI's error object."""
    assert isinstance(error.body, dict)
    return error.body


async def refused(cluster: Cluster, api_key: str = "none", **extra: object) -> APIStatusError:
    async with cluster.client(api_key=api_key) as client:
        with pytest.raises(APIStatusError) as raised:
            await client.completions.create(model="tiny", prompt="b", max_tokens=1, extra_body=extra)
    return raised.value


async def test_what_says_nothing_is_promised_nothing(front: Cluster) -> None:
    arrived = await told(front)
    assert (arrived.priority, arrived.slo_ttft_s, arrived.slo_tbt_s) == (0, 0.0, 0.0)
    assert arrived.tenant == "anonymous"


@pytest.mark.parametrize("name", ["auto", "default", None])
async def test_what_leaves_its_service_tier_to_the_server_gets_the_default(cluster: Cluster, name: str | None) -> None:
    async with fronted(cluster, slo_classes=("a=1:0.5", "b=-:0.25"), default_slo_class="a"):
        arrived = await told(cluster, service_tier=name)
    assert (arrived.slo_ttft_s, arrived.slo_tbt_s) == (1.0, 0.5)


async def test_a_service_tier_is_an_slo_class(cluster: Cluster) -> None:
    async with fronted(cluster, slo_classes=("a=1:0.5", "b=-:0.25"), default_slo_class="a"):
        arrived = await told(cluster, service_tier="b")
    assert (arrived.slo_ttft_s, arrived.slo_tbt_s) == (0.0, 0.25)


async def test_an_unknown_service_tier_is_refused_with_those_that_there_are(front: Cluster) -> None:
    error = await refused(front, service_tier="gold")
    assert error.status_code == 400
    assert said(error)["param"] == "service_tier"
    assert "'gold'" in error.message
    assert "auto, default, interactive, batch" in error.message


async def test_the_lower_a_priority_the_sooner_its_turn_as_vllm_has_it(front: Cluster) -> None:
    assert (await told(front, priority=-3)).priority == 3
    assert (await told(front, priority=7)).priority == -7


@pytest.mark.parametrize("priority", [-11, 11, "high", 1.5])
async def test_a_priority_that_is_none_is_refused(front: Cluster, priority: object) -> None:
    error = await refused(front, priority=priority)
    assert (error.status_code, said(error)["param"]) == (400, "priority")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("plain:k1\nurgent:k2 most_urgent=-5 service_tier=interactive\nslow:k3 most_urgent=2\n")
    return path


async def test_a_key_says_how_urgent_its_requests_may_be(cluster: Cluster, keys: Path) -> None:
    async with fronted(cluster, api_keys_file=keys):
        error = await refused(cluster, "k1", priority=-1)
        assert error.status_code == 400
        assert "allowed are 0 and more" in error.message
        assert (await told(cluster, "k1", priority=3)).priority == -3
        assert (await told(cluster, "k2", priority=-5)).priority == 5
        assert (await told(cluster, "k3")).priority == -2


async def test_a_key_says_what_service_tier_its_requests_have_by_default(cluster: Cluster, keys: Path) -> None:
    async with fronted(cluster, api_keys_file=keys):
        arrived = await told(cluster, "k2")
        assert (arrived.tenant, arrived.slo_ttft_s, arrived.slo_tbt_s) == ("urgent", 5.0, 0.25)
        assert (await told(cluster, "k2", service_tier="batch")).slo_tbt_s == 0.0


@pytest.mark.parametrize("options", ["most_urgent=-11", "most_urgent=x", "service_tier=gold", "weight=2", "k4"])
def test_an_unknown_option_of_a_key_is_refused_without_the_key(tmp_path: Path, options: str) -> None:
    path = tmp_path / "keys"
    path.write_text(f"name:secret {options}\n")
    with pytest.raises(KeysFileError, match="line 1: after the key are allowed") as raised:
        Tenants.load(path, ("interactive",))
    assert "secret" not in str(raised.value)


async def test_who_is_turned_away_after_prefill_gets_no_byte_of_an_answer(front: Cluster) -> None:
    front.answers("abc")
    front.conductor.answers_prefill_done.append(reject(retry_after_s=4.2))
    async with front.client() as client:
        with pytest.raises(APIStatusError) as raised:
            await client.completions.create(model="tiny", prompt="b", max_tokens=3, stream=True)
    assert raised.value.status_code == 429
    assert raised.value.response.headers["retry-after"] == "5"
    assert said(raised.value)["predicted_tbt_s"] == 0.5


async def test_an_attempt_that_follows_a_failure_is_not_held_to_the_ttft(cluster: Cluster) -> None:
    async with fronted(cluster, slo_classes=("a=1:0.5",), default_slo_class="a"):
        cluster.decode.fail_at = (1, "internal")
        cluster.answers("abc")
        async with cluster.client() as client:
            await client.completions.create(model="tiny", prompt="b", max_tokens=3)
    arrivals = [event.arrived for event in cluster.conductor.events("arrived")]
    assert [arrived.slo_ttft_s for arrived in arrivals] == [1.0, 0.0]
    assert {arrived.slo_tbt_s for arrived in arrivals} == {0.5}


@pytest.mark.parametrize("entry", ["a", "a=1", "=1:1", "a=0:1", "a=x:1", "a=1:inf"])
def test_a_class_that_cannot_be_read_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="slo_classes"):
        ServerConfig(conductor="unix:/c", model="m", slo_classes=(entry,))


def test_the_default_class_must_be_one() -> None:
    with pytest.raises(ValueError, match="default_slo_class: 'x': allowed are interactive, batch"):
        ServerConfig(conductor="unix:/c", model="m", default_slo_class="x")
