"""What a Perigee endpoint tells of itself is in the report of a live replay, and nothing is made up of one that tells
nothing.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from perigee.replay.documents import Cluster, Receipt
from perigee.replay.metrics import CachedByTier
from perigee.replay.series import State
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.policies import PolicyNames, make_policies
from perigee.scheduler.receipt_json import document
from perigee.scheduler.shadow import Shadow
from tests.replay.scripted_endpoint import Answer, ScriptedEndpoint
from tests.replay.test_live import STEADY, replay
from tests.scheduler.cluster import PROFILE
from tests.scheduler.cluster import Cluster as Scheduled

LOAD = {"queued_prefill_tokens": 0, "running_sequences": 0, "free_pages": 100, "total_pages": 100, "max_sequences": 8}
SUMS = {"second_checks": 7, "second_rejections_made": 0, "second_rejections_avoided": 0}


def cluster(shadow: bool = True) -> dict[str, Any]:
    """The answer of `GET /cluster`: 700 tokens wait, and of the decode workers one is three quarters full."""
    workers = [
        {"id": "p0", "role": "prefill", "load": LOAD | {"queued_prefill_tokens": 700, "running_sequences": 8}},
        {"id": "d0", "role": "decode", "load": LOAD | {"free_pages": 25, "running_sequences": 2}},
        {"id": "d1", "role": "decode", "load": LOAD | {"running_sequences": 2}},
    ]
    sums = {"shadow": {"placement": "random", "admission": "none", **SUMS}} if shadow else {}
    return {"ready": True, "workers": workers, **sums}


def receipt() -> dict[str, Any]:
    """The answer of `GET /requests/{id}/receipt`, of a request that a Conductor with a shadow has dispatched."""
    scheduled = Scheduled()
    scheduled.conductor = Conductor(profile=PROFILE, shadow=Shadow(make_policies("random", "none")))
    scheduled.add_store()
    for worker_id, role in (("p0", "prefill"), ("d0", "decode")):
        scheduled.add_worker(worker_id, role)
    scheduled.dispatch("r", 100)
    tiers = {"cached_tokens": 96, "cached_ssd_tokens": 32, "cached_remote_tokens": 4}
    scheduled.prefill_done("r", compute_s=0.1, ttft_s=0.3, **tiers)
    return {"id": "r", "choices": [document(each) for each in scheduled.conductor.receipts.find("r")]}


@pytest.fixture
def telling(endpoint: ScriptedEndpoint) -> ScriptedEndpoint:
    endpoint.cluster, endpoint.receipt = cluster(), receipt()
    return endpoint


def test_the_state_of_a_cluster_is_read_off_its_workers() -> None:
    assert Cluster.model_validate(cluster()).state(2.5) == State(2.5, queued_tokens=700, decode_load=0.5, decoding=4)
    assert Cluster(workers=()).state(0.0) == State(0.0, 0, 0.0, 0)


def test_a_receipt_tells_hits_by_tier_and_both_decisions() -> None:
    read = Receipt.model_validate(receipt())
    assert read.cached_by_tier == CachedByTier(60, 32, 4)
    assert read.policies == PolicyNames()
    ((ours, theirs),) = read.judged
    assert (ours.prefill, ours.decode, ours.rejected) == ("p0", "d0", False)
    assert ours == theirs and ours.ttft_s == pytest.approx(0.1, abs=0.05)


async def test_the_report_tells_what_the_endpoint_tells(telling: ScriptedEndpoint, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    status, report = await replay(tmp_path, telling.url, (0, 200, 2), (0, 300, 2), html=page)
    assert status == 0
    assert report["cached_by_tier"] == {"dram": 120, "ssd": 64, "remote": 8}
    series = report["series"]
    assert len(series["at_s"]) == len(series["decode_load"]) >= 2
    assert (set(series["decode_load"]), set(series["queued_tokens"]), set(series["decoding"])) == ({0.5}, {700}, {4})
    assert series["completed"][-1] == 2
    shadow = report["shadow"]
    assert (shadow["decisions"], shadow["placed_elsewhere"], shadow["second"]["checks"]) == (2, 0, 0)
    assert (shadow["acting"]["placement"], shadow["shadow"]["placement"]) == ("perigee", "random")
    assert sorted(path for path in telling.asked if path != "/cluster") == [
        "/requests/cmpl-0/receipt",
        "/requests/cmpl-1/receipt",
    ]
    text = page.read_text(encoding="utf-8")
    for shown in ("Load of the decode workers", "from the cache, so far", "What a shadow would have done"):
        assert shown in text
    assert "not told" not in text


async def test_an_endpoint_that_tells_nothing_is_said_to(
    endpoint: ScriptedEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    _, report = await replay(tmp_path, endpoint.url, (0, 200, 2), html=page)
    assert (report["cached_by_tier"], report["shadow"]) == (None, None)
    assert set(report["series"]) == {"at_s", "in_flight", "completed", "good", "rejected", "failed"}
    assert endpoint.asked == ["/cluster"]
    text = page.read_text(encoding="utf-8")
    assert "not told by this endpoint" in text
    assert "Load of the decode workers" not in text
    assert capsys.readouterr().out.count("not told") == 2


async def test_a_run_that_is_not_to_observe_asks_for_nothing(telling: ScriptedEndpoint, tmp_path: Path) -> None:
    _, report = await replay(tmp_path, telling.url, (0, 200, 2), observe=False)
    assert (telling.asked, report["shadow"], report["completed"]) == ([], None, 1)


async def test_receipts_that_are_forgotten_leave_the_rest(telling: ScriptedEndpoint, tmp_path: Path) -> None:
    telling.cluster, telling.receipt = cluster(shadow=False), None
    _, report = await replay(tmp_path, telling.url, (0, 200, 2))
    assert (report["cached_by_tier"], report["shadow"]) == (None, None)
    assert report["series"]["decode_load"]


async def test_a_receipt_of_nothing_is_passed_over(telling: ScriptedEndpoint, tmp_path: Path) -> None:
    telling.receipt = {"id": "r", "choices": []}
    status, report = await replay(tmp_path, telling.url, (0, 1, 2), (0, 1, 2))
    assert (status, report["completed"], report["shadow"]) == (0, 2, None)


async def test_rejected_requests_have_receipts_too(telling: ScriptedEndpoint, tmp_path: Path) -> None:
    async def reject(answer: Answer) -> int:
        return 429

    telling.script = reject
    _, report = await replay(tmp_path, telling.url, (0, 200, 2))
    assert (report["rejected"], report["shadow"]["decisions"]) == (1, 1)


async def test_cancelled_it_reports_what_there_is(telling: ScriptedEndpoint, tmp_path: Path) -> None:
    running = asyncio.create_task(replay(tmp_path, telling.url, *STEADY))
    await telling.first_ended.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["completed"] >= 1
    assert set(report["series"]["decode_load"]) == {0.5}
