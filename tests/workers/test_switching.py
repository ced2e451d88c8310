"""Workers that change pools and workers that end, over real gRPC: no sequence is lost by either."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace

import grpc
import pytest

from perigee.workers import worker_pb2 as pb
from perigee.workers.engine.sequence import Ref
from perigee.workers.messages import DecodeJoined, Failed, FromWorker, PrefillDone, WorkerLost
from perigee.workers.worker_pb2_grpc import WorkerStub
from tests.workers.sites import Expected, Site, Worker, hand_over, prefilled, prompt, steps


async def set_role(worker: Worker, role: str, incarnation: str = "") -> None:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        request = pb.SetRoleRequest(incarnation=incarnation or worker.client.worker_id, role=role)
        await WorkerStub(channel).SetRole(request)


async def reports(worker: Worker) -> AsyncIterator[pb.WorkerReport]:
    async with grpc.aio.insecure_channel(worker.address) as channel:
        async for report in WorkerStub(channel).Watch(pb.WatchRequest()):
            yield report


async def test_workers_swap_their_roles_and_go_on(site: Site, expected: Expected) -> None:
    one, other = await site.worker("prefill"), await site.worker("decode")
    before = site.sequence("before", prompt(50), 20)
    assert await hand_over(one, other, before) == expected.tokens(before)
    await site.until_at_rest()
    await set_role(one, "decode")
    await set_role(other, "prefill")
    after = site.sequence("after", prompt(90, salt=1), 20)
    assert await hand_over(other, one, after) == expected.tokens(after)
    await site.until_at_rest()
    await set_role(one, "mixed")
    again = site.sequence("again", prompt(70, salt=2), 20)
    with one.client.open(again.ref) as channel:
        assert [(await prefilled(channel, again)).token.token, *await steps(channel)] == expected.tokens(again)


async def test_the_next_report_shows_the_new_role(site: Site) -> None:
    worker = await site.worker("prefill")
    watch = reports(worker)
    assert (await anext(watch)).role == "prefill"
    await set_role(worker, "decode")
    async for report in watch:
        if report.role != "prefill":
            assert report.role == "decode"
            break


async def test_prompts_are_admitted_just_in_time_in_roles_that_compute_them(site: Site) -> None:
    worker = await site.worker("decode")
    batcher = worker.host.thread.engine.batcher
    assert not batcher.limits.prompts_just_in_time
    await set_role(worker, "prefill")
    assert batcher.limits.prompts_just_in_time
    await set_role(worker, "decode")
    assert not batcher.limits.prompts_just_in_time


async def test_a_worker_that_has_a_sequence_keeps_its_role(site: Site) -> None:
    worker = await site.worker("prefill")
    sequence = site.sequence("a", prompt(40), 8)
    with worker.client.open(sequence.ref) as channel:
        await prefilled(channel, sequence)  # its blocks wait for decode
        with pytest.raises(grpc.aio.AioRpcError, match="1 sequences are here") as refused:
            await set_role(worker, "decode")
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        channel.joined()
        await site.until_at_rest()
    await set_role(worker, "decode")


@pytest.mark.parametrize(
    ("role", "incarnation", "code"),
    [
        ("decode", "another", grpc.StatusCode.FAILED_PRECONDITION),
        ("", "", grpc.StatusCode.INVALID_ARGUMENT),
        ("both", "", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_what_is_no_role_or_not_meant_for_it_changes_nothing(
    site: Site,
    role: str,
    incarnation: str,
    code: grpc.StatusCode,
) -> None:
    worker = await site.worker("prefill")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await set_role(worker, role, incarnation)
    assert refused.value.code() is code and worker.host.role == "prefill"


async def test_what_was_meant_for_the_role_before_is_unknown_and_harms_nobody(
    site: Site,
    expected: Expected,
) -> None:
    worker = await site.worker("mixed")
    sequence = site.sequence("a", prompt(40), 8)
    with worker.client.open(sequence.ref) as channel:
        channel.prepare(sequence)
        assert await failure(channel.receive()) == "unknown"
        for role in ("prefill", "decode"):
            channel.start(sequence, role=role)
            assert await failure(channel.receive()) == "unknown"
    await set_role(worker, "decode")
    with worker.client.open(Ref("late")) as channel:
        for role in ("prefill", "mixed", ""):
            channel.start(replace(sequence, ref=Ref("late")), role=role)
            assert await failure(channel.receive()) == "unknown"
    await set_role(worker, "mixed")
    with worker.client.open(sequence.ref) as channel:
        channel.start(sequence, role="mixed")
        first = await channel.receive()
        assert isinstance(first, PrefillDone)
        assert [first.token.token, *await steps(channel)] == expected.tokens(sequence)
    await site.until_at_rest()


async def failure(message: Awaitable[FromWorker]) -> str:
    failed = await message
    assert isinstance(failed, Failed), failed
    return failed.code


async def test_a_worker_that_drains_says_so_and_ends_what_it_has_and_what_is_on_its_way(
    site: Site, expected: Expected
) -> None:
    prefill, decode = await site.worker("prefill"), await site.worker("decode")
    running, late = site.sequence("running", prompt(50), 200), site.sequence("late", prompt(60, salt=1), 20)
    with prefill.client.open(running.ref) as first, decode.client.open(running.ref) as second:
        second.prepare(running)
        done = await prefilled(first, running)
        watch = reports(decode)
        assert not (await anext(watch)).draining
        drained = asyncio.create_task(decode.service.drain())
        async for report in watch:
            if report.draining:
                break
        assert await hand_over(prefill, decode, late) == expected.tokens(late)
        assert not drained.done()
        second.start(replace(running, token_ids=(*running.token_ids, done.token.token)))
        assert isinstance(await second.receive(), DecodeJoined)
        first.joined()
        assert [done.token.token, *await steps(second)] == expected.tokens(running)
        await drained
        with pytest.raises(WorkerLost):  # hung up, after every token had come
            await second.receive()
    await site.until_at_rest()


async def test_a_worker_without_servers_has_nothing_to_drain(site: Site) -> None:
    worker = await site.worker("mixed")
    await worker.client.close()
    await asyncio.wait_for(worker.service.drain(), 30)
