"""What clients are told when they cannot have what they asked for, and that nobody else is harmed by it."""

import json
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from perigee.scheduler import scheduler_pb2 as pb
from tests.server.conftest import Cluster, fronted
from tests.server.fakes import reject

COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "x"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}


async def post(url: str, data: bytes | str, **headers: str) -> tuple[int, dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=data, headers={"content-type": "application/json", **headers}) as response,
    ):
        return response.status, await response.json()


async def test_a_bad_field_is_named_before_anybody_else_hears_of_the_request(front: Cluster) -> None:
    for endpoint, body in (("completions", COMPLETION), ("chat/completions", CHAT)):
        status, answer = await post(f"{front.url}/v1/{endpoint}", json.dumps(body | {"temperature": "warm"}))
        error = answer["error"]
        assert (status, error["param"], error["type"], error["code"]) == (
            400, "temperature", "invalid_request_error", None,
        )  # fmt: skip
        assert "temperature: " in error["message"] and "'warm'" in error["message"]
    assert front.conductor.heard.items == []


async def test_what_only_the_model_can_tell_is_checked_too(front: Cluster) -> None:
    refused = {
        "prompt": (
            {"prompt": ""},
            {"prompt": [[1], []]},
            {"prompt": [100_000]},
            {"prompt": [1, 2**32]},
            {"prompt": [2**32] * 1000},
        ),
        "stop_token_ids": ({"stop_token_ids": [3, 100_000]},),
        "n": ({"n": 1000}, {"n": 100, "prompt": ["x", "y"]}),
        "min_tokens": ({"min_tokens": 20},),
    }
    for param, changes in refused.items():
        for change in changes:
            status, answer = await post(f"{front.url}/v1/completions", json.dumps(COMPLETION | change))
            assert (status, answer["error"]["param"]) == (400, param)
            assert param in answer["error"]["message"]


@pytest.mark.parametrize("field", ["max_tokens", "min_tokens", "top_k", "n", "seed", "logprobs"])
async def test_no_number_is_too_large_to_be_refused(front: Cluster, field: str) -> None:
    for number in (2**64, 10**4000):
        status, answer = await post(f"{front.url}/v1/completions", json.dumps(COMPLETION | {field: number}))
        assert (status, answer["error"]["param"]) == (400, field)


async def test_a_conversation_that_the_template_refuses_is_the_clients_error(front: Cluster) -> None:
    messages = [{"role": "user", "content": "refuse me"}]
    status, answer = await post(f"{front.url}/v1/chat/completions", json.dumps(CHAT | {"messages": messages}))
    assert (status, answer["error"]["param"]) == (400, "messages")


async def test_what_is_not_json_is_refused(front: Cluster) -> None:
    for data in (b"{", b"", b"[1", b'{"model": "\xff"}', b"[" * 100_000):
        status, answer = await post(f"{front.url}/v1/completions", data)
        assert status == 400
        assert "not valid JSON" in answer["error"]["message"]


async def test_what_does_not_claim_to_be_json_is_refused(front: Cluster) -> None:
    status, answer = await post(f"{front.url}/v1/completions", json.dumps(COMPLETION), **{"content-type": "text/plain"})
    assert (status, answer["error"]["type"]) == (415, "invalid_request_error")


async def test_a_prompt_longer_than_the_context_is_refused(front: Cluster, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="tiny", prompt=[1] * front.card.max_context)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x " * 3000}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


async def test_an_output_limit_beyond_the_context_is_refused(front: Cluster, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], max_completion_tokens=front.card.max_context
        )
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_completion_tokens")


async def test_another_model_is_not_found(front: Cluster, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.completions.create(model="huge", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("huge")


@pytest.mark.parametrize("announced", [True, False])
async def test_too_large_a_body_is_refused_and_harms_nobody(cluster: Cluster, announced: bool) -> None:
    body = json.dumps(COMPLETION | {"prompt": "x" * 100_000}).encode()

    async def chunks() -> Any:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    async with fronted(cluster, max_body_bytes=4096) as front, front.client() as client:
        status, answer = await post(f"{front.url}/v1/completions", body if announced else chunks())
        assert (status, answer["error"]["code"]) == (413, "request_too_large")
        front.answers("hello")
        assert (await client.completions.create(model="tiny", prompt="x", max_tokens=1)).choices[0].text


async def test_unknown_paths_and_methods_get_the_same_form(front: Cluster) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{front.url}/v1/nothing") as response:
            assert response.status == 404
            assert (await response.json())["error"]["type"] == "invalid_request_error"
        async with session.get(f"{front.url}/v1/completions") as response:
            assert (response.status, response.headers["allow"]) == (405, "POST")
            assert "GET /v1/completions" in (await response.json())["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("late", [False, True])
async def test_overload_is_429_with_retry_after_and_predictions(
    front: Cluster, client: AsyncOpenAI, stream: bool, late: bool
) -> None:
    front.answers("hello world")
    (front.conductor.answers_prefill_done if late else front.conductor.answers).append(reject())
    with pytest.raises(openai.RateLimitError) as caught:
        await client.completions.create(model="tiny", prompt="x", stream=stream)
    assert caught.value.response.headers["retry-after"] == "4"
    assert caught.value.response.headers["x-request-id"].startswith("cmpl-")
    assert isinstance(caught.value.body, dict)
    assert (caught.value.body["predicted_ttft_s"], caught.value.body["predicted_tbt_s"]) == (9.0, 0.5)
    if late:
        await front.prefill.hears("cancel")
        await front.decode.hears("cancel")


async def test_a_missing_role_is_503_and_what_never_fits_is_400(front: Cluster, client: AsyncOpenAI) -> None:
    front.conductor.answers += [reject(pb.Reject.UNAVAILABLE), reject(pb.Reject.TOO_LARGE)]
    with pytest.raises(openai.InternalServerError) as unavailable:
        await client.completions.create(model="tiny", prompt="x")
    assert (unavailable.value.status_code, unavailable.value.response.headers["retry-after"]) == (503, "4")
    with pytest.raises(openai.BadRequestError) as too_large:
        await client.completions.create(model="tiny", prompt="x")
    assert too_large.value.code == "context_length_exceeded"


async def test_a_request_is_turned_away_by_its_first_choice_alone(front: Cluster, client: AsyncOpenAI) -> None:
    front.conductor.answers.append(reject())
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model="tiny", prompt=["a", "b"], n=2)
    assert len(front.conductor.events("arrived")) == 1


async def test_once_one_choice_is_admitted_the_others_wait_for_room(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world", eos=True)
    front.conductor.answers += [pb.Command(dispatch=front.conductor.dispatch()), *[reject(retry_after_s=0.01)] * 3]
    answer = await client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=50)
    assert [choice.text for choice in answer.choices] == ["hello world"] * 4
    assert front.conductor.events("arrived")[0].ref.choice == 0
    assert len(front.conductor.events("arrived")) == 7


async def test_a_choice_waits_for_room_until_the_requests_deadline(cluster: Cluster) -> None:
    cluster.answers("hello world", eos=True)
    cluster.conductor.answers += [pb.Command(dispatch=cluster.conductor.dispatch()), *[reject(retry_after_s=0.01)] * 99]
    async with fronted(cluster, request_timeout_s=0.3, recovery_wait_s=0) as front, front.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="tiny", prompt="a", n=2, max_tokens=50)
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")


async def test_one_refused_choice_ends_the_others(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers("hello world")
    front.decode.wait_at = 1
    front.conductor.answers += [pb.Command(dispatch=front.conductor.dispatch()), reject(pb.Reject.TOO_LARGE)]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="tiny", prompt=["a", "b"])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    await front.decode.hears("cancel")
    await front.conductor.hears("cancelled")
