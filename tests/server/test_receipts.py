"""GET /requests/{id}/receipt: what the Conductor wrote down about a request, for its tenant alone."""

import json
from pathlib import Path

import aiohttp
import pytest
from openai import AsyncOpenAI

from tests.server.conftest import Cluster, fronted


async def get(url: str, **headers: str) -> tuple[int, dict[str, object]]:
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        return response.status, json.loads(await response.text())


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("anna:key-a\nbert:key-b\n")
    return path


async def test_the_id_of_a_completion_names_its_receipt(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world")
    answer = await client.completions.create(model="tiny", prompt="x", max_tokens=2)
    front.conductor.receipts = {("anonymous", answer.id): ['{"choice": 0}', '{"choice": 1}']}
    status, body = await get(f"{front.url}/requests/{answer.id}/receipt")
    assert (status, body) == (200, {"id": answer.id, "choices": [{"choice": 0}, {"choice": 1}]})


async def test_a_request_that_is_unknown_or_forgotten_is_404(front: Cluster) -> None:
    status, body = await get(f"{front.url}/requests/cmpl-unknown/receipt")
    error = body["error"]
    assert isinstance(error, dict)
    assert (status, error["code"], error["type"]) == (404, "receipt_not_found", "invalid_request_error")
    assert error["message"].startswith("there is no receipt of a request 'cmpl-unknown' of yours; kept are")
    assert "the last 77" in error["message"]


async def test_a_tenant_sees_its_own_requests_alone(cluster: Cluster, keys: Path) -> None:
    cluster.answers("hello")
    cluster.conductor.receipts = {("anna", "r"): ["{}"]}
    async with fronted(cluster, api_keys_file=keys) as front:
        url = f"{front.url}/requests/r/receipt"
        assert (await get(url, authorization="Bearer key-a"))[0] == 200
        assert (await get(url, authorization="Bearer key-b"))[0] == 404
        assert (await get(url, authorization="Bearer key-c"))[0] == 401
        assert (await get(url))[0] == 401


async def test_the_conductor_is_told_whose_request_it_is(cluster: Cluster, keys: Path) -> None:
    cluster.answers("hello")
    async with fronted(cluster, api_keys_file=keys) as front, front.client(api_key="key-b") as client:
        await client.completions.create(model="tiny", prompt="x", max_tokens=1)
    (event,) = cluster.conductor.events("arrived")
    assert event.arrived.tenant == "bert"


async def test_the_conductor_is_told_of_tiers_and_the_longest_wait(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world and more")
    front.prefill.cached = (3, 2, 1)
    await client.completions.create(model="tiny", prompt="the quick brown fox jumps", max_tokens=4)
    (done,) = front.conductor.events("prefill_done")
    told = done.prefill_done
    assert (told.cached_tokens, told.cached_ssd_tokens, told.cached_remote_tokens) == (6, 2, 1)
    (finished,) = await front.conductor.hears("finished")
    assert finished.finished.max_tbt_s >= finished.finished.mean_tbt_s > 0


async def test_without_a_conductor_receipts_are_unavailable(front: Cluster) -> None:
    await front.conductor.down()
    status, body = await get(f"{front.url}/requests/r/receipt")
    assert (status, body["error"]["code"]) == (503, "unavailable")  # type: ignore[index]


async def test_what_a_shadow_would_have_done_is_in_cluster_and_metrics(front: Cluster) -> None:
    shadow = front.conductor.state.shadow
    shadow.placement, shadow.admission, shadow.arrivals, shadow.same_workers = "random", "early", 9, 4
    shadow.ttft_difference_s = -0.5
    _, body = await get(f"{front.url}/cluster")
    assert body["shadow"]["same_workers"] == 4  # type: ignore[index]
    async with aiohttp.ClientSession() as session, session.get(f"{front.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    labels = '{admission="early",placement="random"}'
    assert f"perigee_shadow_arrivals_total{labels} 9.0" in lines
    assert f"perigee_shadow_ttft_difference_seconds_sum{labels} -0.5" in lines
