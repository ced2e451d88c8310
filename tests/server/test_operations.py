"""Models, health, cluster state, metrics, and API keys."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from pydantic import ValidationError

from perigee.scheduler import scheduler_pb2 as pb
from perigee.scheduler.scheduler_pb2 import PredictionError
from perigee.server.config import ServerConfig
from perigee.server.tenants import KeysFileError, Tenants, tenant_salt
from tests.server.conftest import Cluster, fronted


async def get(url: str, **headers: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        return response.status, await response.text()


async def test_models_lists_the_one_that_is_served(front: Cluster, client: AsyncOpenAI) -> None:
    models = await client.models.list()
    assert [model.id for model in models.data] == ["tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"


async def test_the_model_is_known_by_its_served_name_alone(cluster: Cluster) -> None:
    cluster.answers("hello")
    async with fronted(cluster, served_model_name="org/nice") as front, front.client() as client:
        assert (await client.models.retrieve("org/nice")).id == "org/nice"
        answer = await client.completions.create(model="org/nice", prompt="x", max_tokens=1)
        assert answer.model == "org/nice"
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="tiny", prompt="x")


async def test_health_says_what_is_missing(front: Cluster) -> None:
    assert await get(f"{front.url}/health") == (200, '{"status":"ok","missing":[]}')
    del front.conductor.state.workers[1]
    front.conductor.state.ready = False
    status, text = await get(f"{front.url}/health")
    assert (status, json.loads(text)["missing"]) == (503, ["decode worker"])
    await front.conductor.down()
    status, text = await get(f"{front.url}/health")
    assert (status, json.loads(text)["missing"]) == (503, ["conductor"])


async def test_before_any_worker_has_come_requests_are_503(cluster: Cluster) -> None:
    cluster.conductor.state = pb.ClusterState()
    async with fronted(cluster) as front, front.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="tiny", prompt="x")
    assert caught.value.status_code == 503


async def test_cluster_shows_every_process_and_its_load(front: Cluster) -> None:
    status, text = await get(f"{front.url}/cluster")
    state: dict[str, Any] = json.loads(text)
    assert status == 200 and state["ready"] and state["fresh"]
    assert [(worker["id"], worker["role"], worker["pid"]) for worker in state["workers"]] == [
        ("prefill-0", "prefill", 42),
        ("decode-0", "decode", 42),
    ]
    assert state["workers"][0]["address"] == front.prefill.address
    assert state["workers"][0]["load"]["computed_prompt_tokens_total"] == 7
    assert (state["stores"][0]["id"], state["stores"][0]["load"]["free_slots"]) == ("store-0", 4)
    assert state["stores"][0]["load"]["orphaned_blocks"] == 0


async def test_metrics_count_requests_tokens_and_the_cluster(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world", eos=True)
    front.prefill.cached = (3, 2, 1)
    answer = await client.completions.create(model="tiny", prompt="the quick brown fox jumps", max_tokens=50)
    with pytest.raises(openai.BadRequestError):
        await client.completions.create(model="tiny", prompt="")
    _, text = await get(f"{front.url}/metrics")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert answer.usage is not None
    assert lines['perigee_requests_total{endpoint="completions",outcome="completed"}'] == "1.0"
    assert lines['perigee_requests_total{endpoint="completions",outcome="invalid"}'] == "1.0"
    assert float(lines["perigee_output_tokens_total"]) == answer.usage.completion_tokens
    assert float(lines["perigee_prompt_tokens_total"]) == answer.usage.prompt_tokens
    assert lines["perigee_ttft_seconds_count"] == "1.0"
    assert float(lines["perigee_tbt_seconds_count"]) == answer.usage.completion_tokens - 1
    assert lines['perigee_cached_tokens_total{tier="ssd"}'] == "2.0"
    assert lines["perigee_running_requests"] == "0.0"
    assert lines['perigee_worker_prompt_tokens_computed_total{role="prefill",worker="prefill-0"}'] == "7.0"
    assert lines['perigee_store_stored_blocks_total{store="store-0"}'] == "6.0"
    assert lines["perigee_orphaned_blocks"] == "0.0"


async def test_metrics_tell_how_good_predictions_were(front: Cluster) -> None:
    front.conductor.state.ttft_error.CopyFrom(PredictionError(count=7, mean=0.125, p50=0.0625, p90=0.25, bias=-0.5))
    await get(f"{front.url}/cluster")  # which asks for the state
    _, text = await get(f"{front.url}/metrics")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['perigee_ttft_prediction_error{quantile="0.5"}'] == "0.0625"
    assert lines['perigee_ttft_prediction_error{quantile="0.9"}'] == "0.25"
    assert lines["perigee_ttft_prediction_error_mean"] == "0.125"
    assert lines["perigee_ttft_prediction_bias"] == "-0.5"
    assert (lines["perigee_ttft_predictions"], lines["perigee_tbt_predictions"]) == ("7.0", "0.0")


async def test_a_node_that_does_not_answer_has_no_metrics_rather_than_zeros(front: Cluster) -> None:
    front.conductor.state.stores[0].ClearField("status")
    front.conductor.state.workers[0].ClearField("report")
    await get(f"{front.url}/cluster")  # which asks for the state
    _, text = await get(f"{front.url}/metrics")
    assert 'store="store-0"' not in text and 'worker="prefill-0"' not in text
    assert 'worker="decode-0"' in text


async def test_what_outlives_the_grace_period_is_told_that_the_server_stops(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.answers("hello world over the lazy dog")
    cluster.decode.wait_at = 3
    async with fronted(cluster) as front:
        client = front.client()
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        whole = asyncio.create_task(client.completions.create(model="tiny", prompt="x"))
        await front.conductor.hears("joined", count=2)
    with pytest.raises(openai.APIError, match="shutting down"):
        async for _ in stream:
            pass
    with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
        await whole
    assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
    await cluster.decode.hears("cancel", count=2)
    await client.close()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_body_that_never_ends_does_not_hold_up_the_end(cluster: Cluster) -> None:
    async with fronted(cluster) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(front.url.rpartition(":")[2]))
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n"
        writer.write(f"{head}expect: 100-continue\r\n\r\n".encode())
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
    writer.close()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# tenants\nanna:key-a\n\nbert: key-b \nanna:key-a2\n")
    return path


async def test_with_keys_strangers_are_turned_away(cluster: Cluster, keys: Path) -> None:
    cluster.answers("hello")
    async with fronted(cluster, api_keys_file=keys) as front:
        async with front.client(api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.completions.create(model="tiny", prompt="x")
            assert caught.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        assert (await get(f"{front.url}/cluster"))[0] == 401
        assert (await get(f"{front.url}/cluster", authorization="bearer key-b"))[0] == 200
        assert (await get(f"{front.url}/health"))[0] == 200
        async with front.client(api_key="key-b") as client:
            await client.completions.create(model="tiny", prompt="x", max_tokens=1)


async def test_tenants_never_share_a_block(cluster: Cluster, keys: Path) -> None:
    cluster.answers("hello")
    async with fronted(cluster, api_keys_file=keys) as front:
        for key in ("key-a", "key-a2", "key-b"):
            async with front.client(api_key=key) as client:
                await client.completions.create(model="tiny", prompt="the quick brown fox", max_tokens=1)
    sequences = [start.sequence for start in cluster.prefill.said("start")]
    assert [sequence.salt for sequence in sequences] == [tenant_salt(name) for name in ("anna", "anna", "bert")]
    assert sequences[0].block_keys == sequences[1].block_keys
    assert not set(sequences[0].block_keys) & set(sequences[2].block_keys)


@pytest.mark.parametrize("text", ["", "# nothing\n", "no colon\n", ":key\n", "name:\n"])
def test_a_keys_file_that_says_nothing_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(KeysFileError, match="api_keys_file"):
        Tenants.load(path)
    with pytest.raises(KeysFileError, match="cannot be read"):
        Tenants.load(tmp_path / "missing")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_without_keys_only_loopback_is_listened_on(host: str, keys: Path) -> None:
    with pytest.raises(ValidationError, match="api_keys_file"):
        ServerConfig(host=host, conductor="unix:/c", model="m")
    assert ServerConfig(host=host, conductor="unix:/c", model="m", api_keys_file=keys).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.3.2.1"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert ServerConfig(host=host, conductor="unix:/c", model="m").api_keys_file is None
