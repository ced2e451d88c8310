"""The roles over real gRPC and a real store node: what is handed over, and that nothing stays behind."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest

from perigee.kvstore import node, store_pb2, store_pb2_grpc
from perigee.kvstore.blocks import BlockKey, chain
from perigee.kvstore.client import StoreClient
from perigee.kvstore.config import StoreConfig
from perigee.workers.client import AttemptChannel, WorkerClient
from perigee.workers.config import Role, WorkerConfig
from perigee.workers.engine.sequence import FinishReason, Ref, Sampling, Sequence
from perigee.workers.host import Host
from perigee.workers.loading import load_engine, model_card
from perigee.workers.messages import DecodeJoined, Failed, PrefillDone, StepOutput
from perigee.workers.model.config import load_config
from perigee.workers.service import WorkerService
from perigee.workers.worker_pb2_grpc import add_WorkerServicer_to_server
from tests.workers.engines import BLOCK_TOKENS, run
from tests.workers.engines import engine as load_test_engine

PAGES = 64


@dataclass
class Worker:
    host: Host
    client: WorkerClient
    address: str

    @property
    def is_at_rest(self) -> bool:
        batcher = self.host.thread.engine.batcher
        return batcher.pool.num_free == PAGES and not batcher.active and not batcher.waiting and not self.host.sessions


class Site:
    """One store node, and workers of the tiny model around it, all in the test's event loop."""

    def __init__(self, model: Path, folder: Path, stack: AsyncExitStack) -> None:
        self.model = model
        self.folder = folder
        self.stack = stack
        self.namespace = BlockKey(b"")
        self.workers: list[Worker] = []

    async def worker(self, role: Role) -> Worker:
        worker = await self.stack.enter_async_context(_worker(self, role, f"{role}-{len(self.workers)}"))
        self.workers.append(worker)
        return worker

    def sequence(self, name: str, token_ids: list[int], max_tokens: int, **sampling: object) -> Sequence:
        values = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True} | sampling
        keys = tuple(chain(self.namespace, token_ids, BLOCK_TOKENS))
        return Sequence(Ref(name), tuple(token_ids), len(token_ids), keys, Sampling(**values))  # type: ignore[arg-type]

    async def until_at_rest(self) -> store_pb2.StoreStatus:
        """Every page is free, nothing is leased, reserved or orphaned."""
        async with grpc.aio.insecure_channel(f"unix:{self.folder}/grpc.sock") as channel:
            stub = store_pb2_grpc.StoreNodeStub(channel)
            while True:
                status = await stub.Status(store_pb2.StatusRequest())
                held = status.leased_blocks + status.reserved_blocks
                if not held and all(worker.is_at_rest for worker in self.workers):
                    assert status.orphaned_blocks == 0
                    return status
                await asyncio.sleep(0.01)


@asynccontextmanager
async def _worker(site: Site, role: Role, name: str) -> AsyncIterator[Worker]:
    config = WorkerConfig(
        id=name,
        role=role,
        model=str(site.model),
        store=site.folder / "store.sock",
        directory=f"unix:{site.folder}/nobody.sock",
        dtype="float32",
        block_tokens=BLOCK_TOKENS,
        kv_tokens=PAGES * BLOCK_TOKENS,
        max_batched_tokens=128,
        listen=f"unix:{site.folder}/{name}.sock",
    )
    model = load_config(site.model)
    card = model_card(site.model, model, config)
    site.namespace = BlockKey(card.namespace)
    payload_bytes = model.payload_layout("float32", BLOCK_TOKENS).payload_bytes
    store = await StoreClient.connect(
        config.store, worker_id=name, incarnation=name, payload_bytes=payload_bytes, block_tokens=BLOCK_TOKENS
    )
    host = Host(role, load_engine(site.model, model, config), store, site.namespace, store_wait_s=20)
    server = grpc.aio.server()
    add_WorkerServicer_to_server(WorkerService(host, config, card, name), server)
    server.add_insecure_port(config.listen)
    await server.start()
    host.thread.start()
    worker = Worker(host, await WorkerClient.connect(name, config.listen), config.listen)
    try:
        yield worker
    finally:
        await worker.client.close()
        await server.stop(grace=None)
        await host.thread.stop()
        await store.close()


@pytest.fixture
async def site(tiny_llama: Path, tmp_path: Path) -> AsyncIterator[Site]:
    config = StoreConfig(
        listen=f"unix:{tmp_path}/grpc.sock",
        socket=tmp_path / "store.sock",
        directory=f"unix:{tmp_path}/nobody.sock",
        dram_bytes=64 << 20,
    )
    serving = asyncio.create_task(node.run(config))
    while not config.socket.exists():  # noqa: ASYNC110  # a file's appearance is no event
        await asyncio.sleep(0.01)
    async with AsyncExitStack() as stack:
        yield Site(tiny_llama, tmp_path, stack)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> "Expected":
    return Expected(tiny_llama)


class Expected:
    """What a lone engine generates."""

    def __init__(self, model: Path) -> None:
        self._engine = load_test_engine(model, kv_tokens=8192)

    def tokens(self, sequence: Sequence) -> list[int]:
        return run(self._engine, [sequence])[0]


def prompt(length: int, salt: int = 0) -> list[int]:
    return [3 + (37 * i + 101 * salt) % 500 for i in range(length)]


async def prefilled(channel: AttemptChannel, sequence: Sequence) -> PrefillDone:
    channel.start(sequence)
    done = await channel.receive()
    assert isinstance(done, PrefillDone), done
    return done


async def hand_over(prefill: Worker, decode: Worker, sequence: Sequence) -> list[int]:
    """The whole life of a sequence, as a front end drives it: its output."""
    with prefill.client.open(sequence.ref) as first, decode.client.open(sequence.ref) as second:
        second.prepare(sequence)
        done = await prefilled(first, sequence)
        second.start(replace(sequence, token_ids=(*sequence.token_ids, done.token.token)))
        assert isinstance(await second.receive(), DecodeJoined)
        first.joined()
        return [done.token.token, *await steps(second)]


async def steps(channel: AttemptChannel) -> list[int]:
    tokens = []
    while True:
        step = await channel.receive()
        assert isinstance(step, StepOutput), step
        tokens.append(step.token.token)
        if step.finish_reason is not FinishReason.NOT_FINISHED:
            return tokens


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
