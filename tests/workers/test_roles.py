"""The roles over real gRPC and a real store node: what is handed over, and that nothing stays behind."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import grpc
import pytest

from perigee.kvstore import store_pb2, store_pb2_grpc
from perigee.workers.client import WorkerClient
from perigee.workers.engine.sequence import Ref, Sampling
from perigee.workers.messages import DecodeJoined, Failed, PrefillDone
from tests.workers.sites import Expected, Site, hand_over, prefilled, prompt, steps


@pytest.mark.parametrize("length", [1, 31, 32, 33, 200])
async def test_decode_goes_on_from_prefills_blocks(site: Site, expected: Expected, length: int) -> None:
    prefill, decode = await site.worker("prefill"), await site.worker("decode")
    sequence = site.sequence("a", prompt(length), 40)
    assert await hand_over(prefill, decode, sequence) == expected.tokens(sequence)
    assert decode.host.thread.engine.totals.computed_prompt_tokens == 0
    await site.until_at_rest()


async def test_a_start_that_overtakes_the_blocks_waits_for_them(site: Site, expected: Expected) -> None:
    prefill, decode = await site.worker("prefill"), await site.worker("decode")
    sequence = site.sequence("a", prompt(50), 20)
    with prefill.client.open(sequence.ref) as first:
        done = await prefilled(first, sequence)
        with decode.client.open(sequence.ref) as second:
            second.prepare(sequence)
            second.start(replace(sequence, token_ids=(*sequence.token_ids, done.token.token)))
            assert isinstance(await second.receive(), DecodeJoined)
            assert [done.token.token, *await steps(second)] == expected.tokens(sequence)
        first.joined()
    await site.until_at_rest()


async def test_a_mixed_worker_does_both_and_what_it_decoded_is_cached(site: Site, expected: Expected) -> None:
    mixed = await site.worker("mixed")
    turn = site.sequence("first", prompt(40), 60)
    with mixed.client.open(turn.ref) as channel:
        output = [(await prefilled(channel, turn)).token.token, *await steps(channel)]
    assert output == expected.tokens(turn)
    await site.until_at_rest()
    longer = site.sequence("second", [*turn.token_ids, *output], 20)
    with mixed.client.open(longer.ref) as channel:
        done = await prefilled(channel, longer)
        assert done.cached_tokens_dram == 96  # three full blocks: all that has been computed of them
        assert [done.token.token, *await steps(channel)] == expected.tokens(longer)


async def test_cancelling_at_any_moment_frees_everything_and_poisons_nothing(site: Site, expected: Expected) -> None:
    """Others run meanwhile, so that pages which are given back too early would be written by them."""
    mixed = await site.worker("mixed")
    for attempt in range(24):
        sequence = site.sequence(f"cancelled-{attempt}", prompt(20 + attempt), 400)
        other = site.sequence(f"other-{attempt}", prompt(70, salt=attempt + 1), 8)
        with mixed.client.open(sequence.ref) as channel, mixed.client.open(other.ref) as beside:
            channel.start(sequence)
            for _ in range(attempt):
                await channel.receive()
            channel.cancel()
            beside.start(other)
            first = await beside.receive()
            assert isinstance(first, PrefillDone)
            assert [first.token.token, *await steps(beside)] == expected.tokens(other)
    await site.until_at_rest()
    for attempt in (0, 11, 23):
        again = site.sequence(f"again-{attempt}", prompt(20 + attempt), 100)
        with mixed.client.open(again.ref) as channel:
            done = await prefilled(channel, again)
            assert [done.token.token, *await steps(channel)] == expected.tokens(again)


async def test_what_a_server_started_ends_with_its_stream(site: Site) -> None:
    prefill, decode = await site.worker("prefill"), await site.worker("decode")
    server = await WorkerClient.connect("prefill", prefill.address), await WorkerClient.connect("d", decode.address)
    for index in range(6):
        sequence = site.sequence(f"r{index}", prompt(150, salt=index), 200)
        with server[0].open(sequence.ref) as first, server[1].open(sequence.ref) as second:
            second.prepare(sequence)
            first.start(sequence)
            if index % 2:
                first.cancel()
    for client in server:
        await client.close()
    await site.until_at_rest()


async def test_prefill_holds_its_blocks_until_decode_has_joined(site: Site) -> None:
    prefill = await site.worker("prefill")
    sequence = site.sequence("a", prompt(70), 20)
    with prefill.client.open(sequence.ref) as channel:
        await prefilled(channel, sequence)
        async with grpc.aio.insecure_channel(f"unix:{site.folder}/grpc.sock") as store:
            status = await store_pb2_grpc.StoreNodeStub(store).Status(store_pb2.StatusRequest())
        assert status.leased_blocks == 3
        channel.joined()
        assert (await site.until_at_rest()).committed_blocks == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_keys": ()}, "block_keys"),
        ({"token_ids": (1, 2, 99999)}, "token_ids"),
        ({"prompt_len": 9}, "prompt_len"),
        ({"sampling": Sampling(min_tokens=5, stop_token_ids=(4_000_000_000,))}, "stop_token_ids"),
        ({"sampling": Sampling(max_tokens=5000)}, "pages"),
    ],
)
async def test_what_cannot_run_is_refused_by_name_and_harms_nobody(
    site: Site, expected: Expected, change: dict[str, object], named: str
) -> None:
    mixed = await site.worker("mixed")
    good = site.sequence("good", [1, 2, 3], 8)
    with mixed.client.open(Ref("bad")) as channel:
        channel.start(replace(good, ref=Ref("bad"), **change))  # type: ignore[arg-type]
        failed = await channel.receive()
    assert isinstance(failed, Failed) and failed.code == "invalid" and named in failed.message
    with mixed.client.open(good.ref) as channel:
        assert [(await prefilled(channel, good)).token.token, *await steps(channel)] == expected.tokens(good)


async def test_a_start_that_is_not_what_was_prepared_is_refused(site: Site) -> None:
    decode = await site.worker("decode")
    sequence = site.sequence("a", prompt(40), 8)
    with decode.client.open(sequence.ref) as channel:
        channel.prepare(sequence)
        channel.start(replace(sequence, token_ids=(*sequence.token_ids, 5, 6)))
        failed = await channel.receive()
        assert isinstance(failed, Failed) and failed.code == "invalid"
    with decode.client.open(Ref("stranger")) as channel:
        channel.start(replace(sequence, ref=Ref("stranger")))
        failed = await channel.receive()
        assert isinstance(failed, Failed) and failed.code == "unknown"
    await site.until_at_rest()


async def test_the_time_of_loading_is_without_the_wait_for_a_step(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await site.worker("prefill")
    sequence = site.sequence("a", prompt(200), 40)
    with worker.client.open(sequence.ref) as channel:
        await prefilled(channel, sequence)
    thread, step_s = worker.host.thread, 0.5
    call, delayed = thread.call, []

    async def after_a_step(function: Callable[..., object], *arguments: object) -> object:
        if function == worker.host._copy:
            delayed.append(function)
            await asyncio.sleep(step_s)
        return await call(function, *arguments)

    monkeypatch.setattr(thread, "call", after_a_step)
    again = replace(sequence, ref=Ref("again"))
    with worker.client.open(again.ref) as channel:
        began = time.monotonic()
        done = await prefilled(channel, again)
        took_s = time.monotonic() - began
    assert delayed and done.cached_tokens_dram > 0
    # However long the rest takes on a busy machine, the wait is in the one and not in the other.
    assert step_s <= done.queue_s and 0 < done.load_s <= took_s - step_s
