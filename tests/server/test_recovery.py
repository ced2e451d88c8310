"""Workers fail, clients hang up, the Conductor restarts: what the front end makes of it."""

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI

from perigee.kvstore.blocks import chain
from perigee.scheduler import scheduler_pb2 as pb
from perigee.workers.wire import sequence_from_pb
from tests.server.conftest import Cluster, fronted
from tests.server.fakes import FakeWorker, reject

TEXT = "hello world over the lazy dog"


@pytest.fixture
async def spare(cluster: Cluster) -> AsyncIterator[FakeWorker]:
    """Another decode worker, which takes over after the first dispatch."""
    spare = FakeWorker(cluster.sockets / "spare", "decode-1", "decode", cluster.card)
    await spare.up()
    spare.eos = cluster.decode.eos
    first = pb.Command(dispatch=cluster.conductor.dispatch())
    cluster.conductor.answers.append(first)
    cluster.conductor.decode = spare
    yield spare
    await spare.down()


@pytest.mark.parametrize("death", ["stream", "failed"])
async def test_the_stream_goes_on_after_a_decode_worker_is_lost_with_no_token_twice(
    front: Cluster, client: AsyncOpenAI, spare: FakeWorker, death: str
) -> None:
    front.answers(TEXT, eos=True)
    spare.answer = front.decode.answer
    if death == "stream":
        front.decode.die_at = 4
    else:
        front.decode.fail_at = (4, "blocks_missing")
    stream = await client.completions.create(model="tiny", prompt="the fox", max_tokens=90, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT
    failed = (await front.conductor.hears("failed"))[0]
    assert failed.failed.worker_id == "decode-0"
    assert failed.failed.code == ("lost" if death == "stream" else "blocks_missing")
    first, again = (sequence_from_pb(start.sequence) for start in front.prefill.said("start"))
    assert again.ref.attempt == first.ref.attempt + 1
    assert again.token_ids == first.token_ids + tuple(front.tokenizer.encode(TEXT)[:4])
    assert (again.prompt_len, again.seed, again.sampling) == (first.prompt_len, first.seed, first.sampling)
    assert list(again.block_keys) == chain(front.card.namespace, again.token_ids, front.card.block_tokens)
    arrived = front.conductor.events("arrived")[1].arrived
    assert (arrived.num_tokens, arrived.max_tokens) == (len(again.token_ids), 86)
    assert (await front.conductor.hears("finished"))[0].finished.output_tokens == len(front.tokenizer.encode(TEXT)) + 1


async def test_tokens_held_back_for_a_stop_string_survive_a_failure(
    front: Cluster, client: AsyncOpenAI, spare: FakeWorker
) -> None:
    front.answers(TEXT, eos=True)
    spare.answer = front.decode.answer
    front.decode.die_at = 3
    answer = await client.completions.create(model="tiny", prompt="x", max_tokens=90, stop="world over th!")
    assert answer.choices[0].text == TEXT


async def test_a_request_whose_prefill_worker_dies_is_answered_all_the_same(
    front: Cluster, client: AsyncOpenAI
) -> None:
    front.answers(TEXT, eos=True)
    front.prefill.fail_at = (0, "internal")

    async def heal() -> None:
        await front.conductor.hears("failed")
        front.prefill.fail_at = None

    healing = asyncio.create_task(heal())
    answer = await client.completions.create(model="tiny", prompt="x", max_tokens=90)
    assert answer.choices[0].text == TEXT
    await healing


async def test_prefill_is_not_waited_for_once_decode_has_failed(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers(TEXT, eos=True)
    front.prefill.wait_at = 0
    await_start = asyncio.create_task(front.decode.hears("prepare"))
    asking = asyncio.create_task(client.completions.create(model="tiny", prompt="x", max_tokens=90))
    await await_start
    await front.decode.down()
    assert (await front.conductor.hears("failed"))[0].failed.worker_id == "decode-0"
    front.prefill.wait_at = None
    await front.decode.up()
    assert (await asking).choices[0].text == TEXT


async def test_decode_is_not_waited_for_once_prefill_has_failed(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers(TEXT, eos=True)
    front.decode.may_join.clear()
    asking = asyncio.create_task(client.completions.create(model="tiny", prompt="x", max_tokens=90))
    await front.decode.hears("start")
    await front.prefill.down()
    failed = (await front.conductor.hears("failed"))[0].failed
    assert (failed.worker_id, failed.code) == ("prefill-0", "lost")
    await front.prefill.up()
    front.decode.may_join.set()
    assert (await asking).choices[0].text == TEXT


async def test_a_request_that_was_admitted_waits_for_room_after_a_failure(
    front: Cluster, client: AsyncOpenAI, spare: FakeWorker
) -> None:
    front.answers(TEXT, eos=True)
    spare.answer = front.decode.answer
    front.decode.die_at = 2
    front.conductor.answers += [reject(retry_after_s=0.01), reject(pb.Reject.UNAVAILABLE, retry_after_s=0.01)]
    answer = await client.completions.create(model="tiny", prompt="x", max_tokens=90)
    assert answer.choices[0].text == TEXT
    assert [event.ref.attempt for event in front.conductor.events("arrived")] == [0, 1, 2, 3]


async def test_attempts_are_bounded(cluster: Cluster) -> None:
    cluster.answers(TEXT)
    cluster.prefill.fail_at = (0, "internal")
    async with fronted(cluster, max_attempts=3) as front, front.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="tiny", prompt="x")
        await cluster.conductor.hears("failed", count=3)
    assert (caught.value.status_code, caught.value.code) == (500, "generation_failed")
    assert len(cluster.conductor.events("arrived")) == 3


async def test_workers_without_room_are_an_overload(cluster: Cluster) -> None:
    cluster.answers(TEXT)
    cluster.prefill.fail_at = (0, "no_room")
    async with fronted(cluster, max_attempts=2) as front, front.client() as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="tiny", prompt="x")
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("overloaded", "1")


async def test_what_would_fail_anywhere_is_not_tried_again(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers(TEXT)
    front.prefill.fail_at = (0, "invalid")
    with pytest.raises(openai.BadRequestError, match="as scripted") as caught:
        await client.completions.create(model="tiny", prompt="x")
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert len(front.conductor.events("arrived")) == 1


async def test_a_failure_after_the_first_bytes_is_an_event_of_the_stream(cluster: Cluster) -> None:
    cluster.answers(TEXT)
    cluster.decode.fail_at = (2, "internal")
    async with fronted(cluster, max_attempts=1) as front, front.client() as client:
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        received = []
        with pytest.raises(openai.APIError, match="attempts failed"):
            async for chunk in stream:
                received.append(chunk.choices[0].text)
    assert "".join(received) == cluster.tokenizer.decode(cluster.tokenizer.encode(TEXT)[:2])


async def test_a_deadline_ends_what_never_comes(cluster: Cluster) -> None:
    cluster.answers(TEXT)
    cluster.prefill.wait_at = 0
    # Long enough for the sequence to reach its workers before the deadline, however slow the machine.
    async with fronted(cluster, request_timeout_s=3) as front, front.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="tiny", prompt="x")
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    await cluster.conductor.hears("cancelled")
    await cluster.prefill.hears("cancel")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_cancels_everything(front: Cluster, stream: bool) -> None:
    front.answers(TEXT)
    front.decode.wait_at = 3
    async with front.client() as client:
        asking = asyncio.create_task(client.completions.create(model="tiny", prompt="x", stream=stream))
        await front.conductor.hears("joined")
        if stream:
            await (await asking).close()
        else:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
    await front.decode.hears("cancel")
    await front.conductor.hears("cancelled")


async def test_a_client_that_hangs_up_during_prefill_cancels_both_workers(front: Cluster) -> None:
    front.answers(TEXT)
    front.prefill.wait_at = 0
    async with front.client() as client:
        asking = asyncio.create_task(client.completions.create(model="tiny", prompt="x", n=2, stream=True))
        await front.prefill.hears("start")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await front.prefill.hears("cancel")
    await front.decode.hears("cancel")
    assert len(await front.conductor.hears("cancelled")) == 1


async def test_running_requests_outlive_the_conductor(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers(TEXT, eos=True)
    front.decode.wait_at = 3
    asking = asyncio.create_task(client.completions.create(model="tiny", prompt="x", max_tokens=90))
    await front.conductor.hears("joined")
    await front.conductor.down()
    front.decode.go_on.set()
    assert (await asking).choices[0].text == TEXT


async def test_a_prefill_that_ends_while_the_conductor_is_away_proceeds(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers(TEXT, eos=True)
    front.conductor.answers_prefill_done.append(pb.Command())  # it hears of it, and dies before it answers
    asking = asyncio.create_task(client.completions.create(model="tiny", prompt="x", max_tokens=90))
    await front.conductor.hears("prefill_done")
    await front.conductor.down()
    assert (await asking).choices[0].text == TEXT


async def test_a_request_asks_again_when_the_conductor_restarts_before_it_answered(
    front: Cluster, client: AsyncOpenAI
) -> None:
    front.answers(TEXT, eos=True)
    front.conductor.answers.append(pb.Command())
    asking = asyncio.create_task(client.completions.create(model="tiny", prompt="x", max_tokens=90))
    await front.conductor.hears("arrived")
    await front.conductor.down()
    await front.conductor.up()
    assert (await asking).choices[0].text == TEXT


async def test_without_a_conductor_requests_are_503(cluster: Cluster) -> None:
    async with fronted(cluster, conductor_wait_s=0.2) as front, front.client() as client:
        await front.conductor.down()
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="tiny", prompt="x")
    assert caught.value.status_code == 503
    assert "retry-after" in caught.value.response.headers


async def test_a_worker_that_started_anew_gets_a_new_stream(front: Cluster, client: AsyncOpenAI) -> None:
    front.answers(TEXT, eos=True)
    await client.completions.create(model="tiny", prompt="x", max_tokens=90)
    await front.decode.down()
    front.decode.incarnation = "2"
    await front.decode.up()
    answer = await client.completions.create(model="tiny", prompt="x", max_tokens=90)
    assert answer.choices[0].text == TEXT
    assert front.conductor.events("failed") == []
