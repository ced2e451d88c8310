"""Workers that change pools or end, and blocks that are copied and dropped, while requests go on."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from perigee.kvstore import store_pb2
from perigee.kvstore.access import Access
from perigee.kvstore.blocks import BlockKey, chain
from perigee.kvstore.store_pb2_grpc import StoreNodeStub
from perigee.scheduler import scheduler_pb2
from perigee.scheduler.scheduler_pb2_grpc import ConductorStub
from perigee.server.tenants import ANONYMOUS
from perigee.up import UpConfig, conductor_target
from perigee.workers import worker_pb2
from perigee.workers.worker_pb2_grpc import WorkerStub
from tests.e2e.conftest import MODEL
from tests.e2e.endpoint import Answer, Endpoint, Members, Vocabulary
from tests.e2e.parts import Parts, free_port, parts, wait_healthy
from tests.e2e.prompts import random_prompt
from tests.e2e.reference import Reference

pytestmark = pytest.mark.slow

MANY_TOKENS = 2000  # of a stream that goes on while workers are told to end


@dataclass(frozen=True, slots=True)
class Cluster:
    parts: Parts
    endpoint: Endpoint
    conductor: str
    access: Access

    async def state(self) -> scheduler_pb2.ClusterState:
        async with self.access.channel(self.conductor) as channel:
            return await ConductorStub(channel).Cluster(scheduler_pb2.ClusterRequest())

    async def set_role(self, worker_id: str, role: str) -> None:
        """As soon as the worker has no sequence."""
        (worker,) = [worker for worker in (await self.state()).workers if worker.member.id == worker_id]
        request = worker_pb2.SetRoleRequest(incarnation=worker.member.incarnation, role=role)
        async with self.access.channel(worker.member.address) as channel:
            while True:
                try:
                    await WorkerStub(channel).SetRole(request)
                    return
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION, error
                    await asyncio.sleep(0.01)

    async def keys(self, prompt: list[int]) -> list[BlockKey]:
        """Of the whole blocks of a prompt, after that of the namespace."""
        card = (await self.state()).card
        root, size = BlockKey(card.namespace), card.block_tokens
        whole = prompt[: len(prompt) // size * size]
        return [root, *chain(root, whole, size, ANONYMOUS.salt)]


@contextmanager
def _cluster(
    model: Path, vocabulary: Vocabulary, directory: Path, *without: str, **fields: object
) -> Iterator[Cluster]:
    values = {"model": str(model), "served_model_name": MODEL, "dtype": "float32", "dram_bytes": "64MiB"}
    config = UpConfig.model_validate({"port": free_port(), **values, **fields})
    with parts(config, directory, without) as started:
        url = f"http://127.0.0.1:{config.port}"
        wait_healthy(url, started)
        yield Cluster(started, Endpoint(url, MODEL, vocabulary), conductor_target(directory), config.access)


async def test_a_replicated_prefix_is_hit_on_the_other_node_and_trimmed_again(
    tiny_llama: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    fields = {"nodes": 2, "cluster_secret": "a secret of this test alone"}
    with _cluster(tiny_llama, vocabulary, tmp_path, "decode-1", "prefill-1", **fields) as cluster:
        endpoint = cluster.endpoint
        prompt = random_prompt(9 * 32, vocabulary.size, "hot")
        await endpoint.complete(prompt, 4)
        cluster.parts.start("prefill-1")
        await endpoint.until(lambda members: len(members) == 5 and members["store-1"].load["num_slots"])
        root, *keys = await cluster.keys(prompt)
        address = next(s.member.address for s in (await cluster.state()).stores if s.member.id == "store-1")
        async with cluster.access.channel(address) as channel:
            node = StoreNodeStub(channel)
            request = store_pb2.ReplicateRequest(source="store-0", parent=root, keys=keys)
            assert await node.Replicate(request) == store_pb2.Replicated(pulled=9)
            # Whoever prefills now finds the copy, and pulls nothing.
            cluster.parts.kill("prefill-0")
            await endpoint.until(lambda members: len(members) == 4)
            assert (await endpoint.complete(prompt, 4)).cached_tokens == len(prompt) - 1  # the last is always computed
            load = (await endpoint.until_at_rest())["store-1"].load
            assert [load[field] for field in ("pulled_total", "replicated_total", "committed_blocks")] == [9, 9, 9]
            assert (await node.Trim(store_pb2.TrimRequest(keys=keys))).trimmed == 9
        async with grpc.aio.insecure_channel(address) as stranger:
            with pytest.raises(grpc.aio.AioRpcError, match="secret"):
                await StoreNodeStub(stranger).Trim(store_pb2.TrimRequest(keys=keys))


@pytest.fixture(scope="module")
def three(tiny_llama: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two prefill workers and a decode worker."""
    with _cluster(tiny_llama, vocabulary, tmp_path_factory.mktemp("three"), prefill=2) as cluster:
        yield cluster


async def test_workers_change_pools_while_requests_go_on(three: Cluster, reference: Reference) -> None:
    endpoint = three.endpoint
    await endpoint.until(lambda members: len(members) == 4)
    prompts = [random_prompt(40 + number, endpoint.vocabulary.size, "changes pools") for number in range(12)]
    answers = asyncio.ensure_future(_one_after_the_other(endpoint, prompts[:8]))
    await three.set_role("prefill-1", "decode")
    for prompt, answer in zip(prompts[:8], await answers, strict=True):
        reference.assert_greedy(prompt, answer)
    await three.set_role("decode-0", "prefill")
    await endpoint.until(lambda members: (members["prefill-1"].role, members["decode-0"].role) == ("decode", "prefill"))
    failed = await endpoint.metric("perigee_failed_attempts_total")
    for prompt, answer in zip(prompts[8:], await endpoint.complete_all(prompts[8:], 64), strict=True):
        reference.assert_greedy(prompt, answer)
    members = await endpoint.until_at_rest()
    assert members["prefill-1"].load["steps_total"] >= 63
    assert await endpoint.metric("perigee_failed_attempts_total") == failed
    await three.set_role("decode-0", "decode")


async def test_a_worker_that_is_told_to_end_ends_its_streams_first(three: Cluster) -> None:
    endpoint = three.endpoint
    prompt = random_prompt(50, endpoint.vocabulary.size, "drains")
    undisturbed = await endpoint.complete(prompt, MANY_TOKENS)
    failed = await endpoint.metric("perigee_failed_attempts_total")
    received: list[int] = []
    async with aclosing(endpoint.stream(prompt, MANY_TOKENS)) as tokens:
        async for token in tokens:
            received.append(token)
            if len(received) == 20:
                busy = _decoding(await endpoint.until(_decoding))
                three.parts.running[busy].terminate()
    assert received == undisturbed.token_ids
    assert await asyncio.to_thread(three.parts.running[busy].wait) == 0
    assert await endpoint.metric("perigee_failed_attempts_total") == failed
    three.parts.start(busy)
    await endpoint.until(lambda members: busy in members and members[busy].load)


async def test_told_twice_it_ends_at_once_and_its_streams_go_on_elsewhere(three: Cluster) -> None:
    endpoint = three.endpoint
    await endpoint.until(lambda members: len(members) == 4)
    prompt = random_prompt(60, endpoint.vocabulary.size, "told twice")
    undisturbed = await endpoint.complete(prompt, MANY_TOKENS)
    received: list[int] = []
    async with aclosing(endpoint.stream(prompt, MANY_TOKENS)) as tokens:
        async for token in tokens:
            received.append(token)
            if len(received) == 20:
                busy = _decoding(await endpoint.until(_decoding))
                three.parts.running[busy].terminate()
                await endpoint.until(lambda members: any(member.draining for member in members.values()))
                three.parts.running[busy].terminate()
                assert await asyncio.to_thread(three.parts.running[busy].wait) == 0
                three.parts.start(busy)
    assert received == undisturbed.token_ids


async def _one_after_the_other(endpoint: Endpoint, prompts: list[list[int]]) -> list[Answer]:
    return [await endpoint.complete(prompt, 24) for prompt in prompts]


def _decoding(members: Members) -> str:
    busy = [m.id for m in members.values() if m.role == "decode" and m.load["running_sequences"]]
    return busy[0] if busy else ""
