"""A store node and workers around it in the test's event loop, and what a front end does with them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from perigee.kvstore import store_pb2, store_pb2_grpc
from perigee.kvstore.blocks import BlockKey, chain
from perigee.kvstore.client import StoreClient
from perigee.workers.client import AttemptChannel, WorkerClient
from perigee.workers.config import Role, WorkerConfig
from perigee.workers.engine.sequence import FinishReason, Ref, Sampling, Sequence
from perigee.workers.host import Host
from perigee.workers.loading import load_engine, model_card
from perigee.workers.messages import DecodeJoined, PrefillDone, StepOutput
from perigee.workers.model.config import load_config
from perigee.workers.service import WorkerService
from perigee.workers.worker_pb2_grpc import add_WorkerServicer_to_server
from tests.workers.engines import BLOCK_TOKENS, run
from tests.workers.engines import engine as load_test_engine

PAGES = 64


@dataclass
class Worker:
    host: Host
    service: WorkerService
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
    service = WorkerService(host, config, card, name)
    add_WorkerServicer_to_server(service, server)
    server.add_insecure_port(config.listen)
    await server.start()
    host.thread.start()
    worker = Worker(host, service, await WorkerClient.connect(name, config.listen), config.listen)
    try:
        yield worker
    finally:
        await worker.client.close()
        await server.stop(grace=None)
        await host.thread.stop()
        await store.close()


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
