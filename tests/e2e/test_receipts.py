"""A cluster that runs writes down what its scheduler decides, and its recording can be lived through again."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from perigee.scheduler.recording.files import read_lines
from tests.cluster import cluster
from tests.e2e.conftest import MODEL
from tests.e2e.endpoint import PATIENCE_S

pytestmark = pytest.mark.slow  # starts a cluster of its own


async def completion(http: aiohttp.ClientSession, prompt: list[int]) -> str:
    """The id of a completion of eight tokens."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    async with http.post("/v1/completions", json=body) as response:
        assert response.status == 200
        return str((await response.json())["id"])


async def finished_receipt(http: aiohttp.ClientSession, request_id: str) -> dict[str, Any]:
    """The receipt of a request whose only choice has ended, which the Conductor hears of after the client."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async with http.get(f"/requests/{request_id}/receipt") as response:
                assert response.status == 200
                (receipt,) = (await response.json())["choices"]
            if receipt["outcome"] == "finished":
                return dict(receipt)
            await asyncio.sleep(0.05)


async def ask(url: str) -> list[dict[str, Any]]:
    """The receipts of two requests, the second of which finds the first one's blocks."""
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=PATIENCE_S)) as http:
        prompt = list(range(100, 200))
        receipts = [await finished_receipt(http, await completion(http, prompt)) for _ in range(2)]
        async with http.get("/cluster") as response:
            shadow = (await response.json())["shadow"]
        assert (shadow["placement"], shadow["arrivals"], shadow["same_workers"]) == ("random", 2, 2)
        async with http.get("/requests/cmpl-0/receipt") as response:
            assert (response.status, (await response.json())["error"]["code"]) == (404, "receipt_not_found")
    return receipts


async def flushed(recording: Path) -> None:
    """Returns once both requests are in the file, to their ends."""
    async with asyncio.timeout(PATIENCE_S):
        while sum('["Finished",' in line for line in read_lines(recording)) < 2:  # noqa: ASYNC110  # of a file
            await asyncio.sleep(0.05)


def replayed(recording: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "perigee", "replay-log", str(recording), "--json=-", *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr + result.stdout
    return dict(json.loads(result.stdout))


def test_receipts_tell_what_happened_and_a_killed_conductors_recording_is_replayed(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("receipts")
    recording, log = directory / "recording", directory / "log"
    flags = (f"--model={tiny_llama}", f"--served-model-name={MODEL}", "--dtype=float32", "--block-tokens=32")
    written = (f"--record={recording}", f"--receipts-file={log}", "--shadow=placement=random,admission=none")
    with cluster(directory, *flags, *written) as started:
        receipts = asyncio.run(ask(started.wait_ready()))
        asyncio.run(flushed(recording))
        started.children()["conductor"].kill()
        assert started.process.wait(PATIENCE_S) == 1
    for receipt in receipts:
        (attempt,) = receipt["attempts"]
        plan, actual = attempt["plan"], attempt["actual"]
        assert (plan["prefill"]["worker"], plan["decode"]["worker"]) == ("prefill-0", "decode-0")
        assert plan["predicted_ttft_s"] > 0 and plan["predicted_tbt_s"] > 0
        assert actual["ttft_s"] > actual["compute_s"] > 0
        assert actual["max_tbt_s"] >= actual["mean_tbt_s"] > 0
        assert actual["output_tokens"] == 8
    first, second = (receipt["attempts"][0] for receipt in receipts)
    assert sum(first["actual"]["cached_tokens"].values()) == 0
    assert second["actual"]["cached_tokens"]["dram"] >= 96
    assert second["plan"]["prefill"]["prefix_tokens"]["dram"] >= 96
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines == receipts
    result = replayed(recording)
    assert result["identical"]
    assert result["commands"]["Dispatch"] == 2
    others = replayed(recording, "--placement=round-robin", "--admission=none")["others"]
    assert others["agreement"] == 1.0
