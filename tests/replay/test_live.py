"""The load generator against a scripted endpoint on a real socket."""

import asyncio
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import ValidationError

from perigee.configuration import ConfigurationError
from perigee.replay.client import CompletionClient, Params
from perigee.replay.config import ReplayConfig
from perigee.replay.errors import EndpointError, TraceError
from perigee.replay.live import run
from perigee.replay.metrics import Outcome, RequestRecord
from tests.replay.scripted_endpoint import Answer, ScriptedEndpoint, by_prompt_length, forever

# Twenty requests a second for longer than any test takes.
STEADY = [(number / 20, 1, 2) for number in range(5000)]
PARAMS = Params("small", temperature=0.0)


def write_trace(path: Path, *requests: tuple[float, int, int]) -> Path:
    """A trace of (arrival in s, prompt tokens, output tokens)."""
    path.write_text(
        "arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(f"{a},{i},{o}\n" for a, i, o in requests)
    )
    return path


async def replay(
    tmp_path: Path, url: str, *requests: tuple[float, int, int], **options: Any
) -> tuple[int, dict[str, Any]]:
    """Exit status and report."""
    report = tmp_path / "report.json"
    trace = write_trace(tmp_path / "trace.csv", *requests)
    status = await run(ReplayConfig(trace=trace, url=url, json_file=str(report), **options))
    return status, json.loads(report.read_text())


async def complete(endpoint: ScriptedEndpoint, timeout_s: float = 60) -> RequestRecord:
    """One request of 8 prompt tokens for 3 output tokens."""
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(timeout_s)) as session:
        client = CompletionClient(session, endpoint.url)
        return await client.complete(PARAMS.body([1] * 8, 3), due_s=0.0, clock=loop.time)


async def test_asks_for_exactly_what_the_trace_has(endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    status, report = await replay(tmp_path, endpoint.url, (0, 700, 3), (0, 20, 5))
    assert status == 0
    assert (report["requests"], report["completed"], report["output_tokens"]) == (2, 2, 8)
    by_length = {len(body.pop("prompt")): body for body in endpoint.bodies}
    assert by_length.keys() == {700, 20}
    assert by_length[20] == {
        "model": "small",
        "temperature": 0.0,
        "max_tokens": 5,
        "min_tokens": 5,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_the_endpoints_key_is_sent(endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    endpoint.key = "s3cret"
    status, report = await replay(tmp_path, endpoint.url, (0, 8, 3), api_key="s3cret")
    assert (status, report["completed"]) == (0, 1)
    with pytest.raises(EndpointError, match="401"):
        await replay(tmp_path, endpoint.url, (0, 8, 3))


async def test_limit_and_length_scale_apply(endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    await replay(tmp_path, endpoint.url, (0, 512, 32), (1000, 512, 32), limit=1, length_scale=0.0625)
    assert [(len(body["prompt"]), body["max_tokens"]) for body in endpoint.bodies] == [(32, 2)]


async def test_prompts_are_of_the_vocabulary_the_endpoint_tells(endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    await replay(tmp_path, endpoint.url, (0, 2000, 1))
    assert {token // 64 for token in endpoint.bodies[0]["prompt"]} == {1, 2, 3, 4, 5, 6}


async def test_an_endpoint_that_does_not_tell_gets_conservative_tokens(
    endpoint: ScriptedEndpoint, tmp_path: Path
) -> None:
    endpoint.models = [{"id": "untold"}]
    await replay(tmp_path, endpoint.url, (0, 2000, 1))
    assert 4000 <= min(endpoint.bodies[0]["prompt"]) <= max(endpoint.bodies[0]["prompt"]) < 28_000


async def test_no_request_waits_for_another(endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    num_requests = 150  # more than clients' usual limits on connections
    all_here = asyncio.Event()

    async def answer_when_all_are_here(answer: Answer) -> None:
        if len(endpoint.bodies) == num_requests:
            all_here.set()
        await all_here.wait()
        await answer.whole()

    endpoint.script = answer_when_all_are_here
    _, report = await replay(tmp_path, endpoint.url, *[(0, 10, 1)] * num_requests)
    assert report["completed"] == num_requests


async def test_no_request_goes_out_before_its_time(endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    _, report = await replay(tmp_path, endpoint.url, (0, 10, 1), (4, 10, 1), (8, 10, 1), speed=40)
    assert report["duration_s"] >= 0.2
    assert report["late_s"]["p50"] >= 0


async def test_tokens_count_when_they_arrive(endpoint: ScriptedEndpoint) -> None:
    now_s = 100.0
    read = asyncio.Event()

    def clock() -> float:
        read.set()
        return now_s

    async def token_at(answer: Answer, time_s: float) -> None:
        nonlocal now_s
        now_s = time_s
        read.clear()
        await answer.token()
        await read.wait()

    async def slow(answer: Answer) -> None:
        for time_s in (103.0, 104.0, 109.0):
            await token_at(answer, time_s)
        await answer.usage(cached_tokens=7, completion_tokens=4, predicted={"ttft_s": 4.5, "tbt_s": 1.0})
        await answer.done()

    endpoint.script = slow
    async with aiohttp.ClientSession() as session:
        client = CompletionClient(session, endpoint.url)
        record = await client.complete(PARAMS.body([1] * 8, 4), 99.0, clock)
    expected = RequestRecord(Outcome.COMPLETED, 99.0, 100.0, 109.0, 8, 7, 4, ttft_s=3.0, tbt_s=5.0, mean_tbt_s=2.0)
    assert record == replace(expected, predicted_ttft_s=4.5, predicted_tbt_s=1.0)


async def reject(answer: Answer) -> int:
    return 429


async def break_down(answer: Answer) -> int:
    return 500


async def fail_midway(answer: Answer) -> None:
    await answer.token()
    await answer.send({"error": {"message": "lost"}})


async def stop_midway(answer: Answer) -> None:
    await answer.token()


async def hang_up(answer: Answer) -> None:
    answer.hang_up()


async def hang_up_midway(answer: Answer) -> None:
    await answer.token()
    answer.hang_up()


async def test_too_many_requests_is_a_rejection(endpoint: ScriptedEndpoint) -> None:
    endpoint.script = reject
    record = await complete(endpoint)
    assert (record.outcome, record.failure) == (Outcome.REJECTED, "")


@pytest.mark.parametrize(
    ("script", "failure", "detail"),
    [
        (break_down, "http_500", "scripted 500"),
        (fail_midway, "stream_error", "lost"),
        (stop_midway, "truncated", "after 1 chunks"),
        (hang_up, "ServerDisconnectedError", ""),
        (hang_up_midway, "ClientPayloadError", ""),
    ],
)
async def test_each_kind_of_failure_has_its_name(
    endpoint: ScriptedEndpoint, script: Any, failure: str, detail: str
) -> None:
    endpoint.script = script
    record = await complete(endpoint)
    assert (record.outcome, record.failure) == (Outcome.FAILED, failure)
    assert detail in record.detail


async def test_no_answer_in_time_is_a_failure(endpoint: ScriptedEndpoint) -> None:
    endpoint.script = forever
    assert (await complete(endpoint, timeout_s=0.05)).failure == "timeout"


async def test_refused_connections_are_failures() -> None:
    record = await complete(ScriptedEndpoint(url="http://127.0.0.1:1"))
    assert record.failure == "ClientConnectorError"


async def test_the_exit_status_tells_of_failures_but_not_of_rejections(
    endpoint: ScriptedEndpoint, tmp_path: Path
) -> None:
    endpoint.script = by_prompt_length(tokens_1=Answer.whole, tokens_2=reject, tokens_3=break_down)
    status, report = await replay(tmp_path, endpoint.url, (0, 1, 1), (0, 2, 1))
    assert (status, report["rejected"], report["goodput_ratio"]) == (0, 1, 0.5)
    status, report = await replay(tmp_path, endpoint.url, (0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 3, 1))
    assert (status, report["completed"], report["rejected"], report["failed"]) == (1, 1, 1, 2)
    assert report["failures"]["http_500"]["count"] == 2


async def test_cancelled_it_reports_what_there_is(endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    running = asyncio.create_task(replay(tmp_path, endpoint.url, *STEADY))
    await endpoint.first_ended.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["completed"] == report["requests"] == report["output_tokens"] / 2 >= 1
    assert report["requests"] + report["unfinished"] == len(STEADY)


async def test_interrupted_as_a_process_it_prints_json_and_nothing_else_on_standard_output(
    endpoint: ScriptedEndpoint, tmp_path: Path
) -> None:
    trace = write_trace(tmp_path / "trace.csv", *STEADY)
    script = (
        "import asyncio; from perigee.replay.config import ReplayConfig; from perigee.replay.live import run;"
        f"asyncio.run(run(ReplayConfig(trace={str(trace)!r}, url={endpoint.url!r}, json_file='-')))"
    )
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=pipe, stderr=pipe)
    await endpoint.first_ended.wait()
    process.send_signal(signal.SIGINT)
    stdout, stderr = await process.communicate()
    report = json.loads(stdout)
    assert report["completed"] >= 1
    assert report["requests"] + report["unfinished"] == len(STEADY)
    assert "TTFT" in stderr.decode()


async def test_the_table_goes_to_standard_output(
    endpoint: ScriptedEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.script = by_prompt_length(tokens_1=Answer.whole, tokens_2=break_down)
    await replay(tmp_path, endpoint.url, (0, 1, 1), (0, 2, 1))
    printed = capsys.readouterr()
    assert "TTFT" in printed.out
    assert "1 × http_500, the first:" in printed.out
    assert printed.err == ""  # no progress bar where there is no terminal


async def test_asks_for_the_model_named(endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    endpoint.models = [{"id": "first"}, {"id": "second", "vocab_size": 512}]
    await replay(tmp_path, endpoint.url, (0, 100, 1), model="second")
    assert endpoint.bodies[0]["model"] == "second"
    assert max(endpoint.bodies[0]["prompt"]) < 512


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ([{"id": "other"}, {"id": "another"}], "model: 'mine' asked for, .* serves 'other', 'another'"),
        ([], "serves none"),
        ([{"name": "x"}], "url: no list of models from"),
    ],
)
async def test_a_model_that_is_not_served_is_an_error(
    endpoint: ScriptedEndpoint, tmp_path: Path, models: list[dict[str, Any]], said: str
) -> None:
    endpoint.models = models
    with pytest.raises(EndpointError, match=said):
        await replay(tmp_path, endpoint.url, (0, 1, 1), model="mine")


async def test_an_endpoint_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=r"url: no list of models from http://127\.0\.0\.1:1/v1/models"):
        await replay(tmp_path, "http://127.0.0.1:1", (0, 1, 1))


async def test_bad_input_is_refused_before_anything_is_sent(endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"length_scale: 0\.3"):
        await replay(tmp_path, endpoint.url, (0, 1, 1), length_scale=0.3)
    trace = write_trace(tmp_path / "trace.csv", (0, 1, 1))
    with pytest.raises(ConfigurationError, match=r"--json: '.*missing/report\.json' cannot be written"):
        await run(ReplayConfig(trace=trace, url=endpoint.url, json_file=str(tmp_path / "missing" / "report.json")))
    assert endpoint.bodies == []


@pytest.mark.parametrize("field", ["slo_ttft_s", "slo_tbt_s", "timeout_s"])
def test_a_bound_that_is_none_is_refused(field: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=f"{field}\n.*finite number"):
        ReplayConfig.model_validate({"trace": tmp_path, field: "inf"})
