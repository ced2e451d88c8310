"""Two store nodes with workers of their own. Their blocks reach each other over TCP alone."""

import asyncio
import resource
from collections.abc import Iterator
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.dram import Mapping, allocate
from perigee.kvstore.transfer.base import BackendMissing, PeerRefused, Wanted
from perigee.kvstore.transfer.mooncake import MooncakeEngine
from perigee.kvstore.transfer.tcp import TcpTransfer
from perigee.up import UpConfig
from tests.cluster import cluster as started_cluster
from tests.e2e.conftest import MODEL
from tests.e2e.endpoint import Answer, Endpoint, Members, Vocabulary
from tests.e2e.parts import Parts, free_port, parts, wait_healthy
from tests.e2e.prompts import random_prompt
from tests.e2e.reference import Reference

pytestmark = pytest.mark.slow

MANY_TOKENS = 1500  # of a stream that goes on while a store node is found and killed


@dataclass(frozen=True, slots=True)
class Cluster:
    parts: Parts
    endpoint: Endpoint

    async def loads(self, field: str) -> list[int]:
        """What both store nodes say of this, once nothing is under way."""
        members = await self.endpoint.until_at_rest()
        return [members[name].load[field] for name in ("store-0", "store-1")]


@contextmanager
def _cluster(
    model: Path, vocabulary: Vocabulary, directory: Path, *without: str, **fields: object
) -> Iterator[Cluster]:
    values = {"model": str(model), "served_model_name": MODEL, "dtype": "float32", "nodes": 2, "max_batched_tokens": 48}
    config = UpConfig.model_validate({"port": free_port(), **values, **fields})
    with parts(config, directory, without) as started:
        url = f"http://127.0.0.1:{config.port}"
        wait_healthy(url, started)
        yield Cluster(started, Endpoint(url, MODEL, vocabulary))


@pytest.fixture(scope="module")
def split(tiny_llama: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node prefills, the other one decodes."""
    with _cluster(tiny_llama, vocabulary, tmp_path_factory.mktemp("split"), "decode-0", "prefill-1") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Both nodes have a worker of each role."""
    with _cluster(tiny_llama, vocabulary, tmp_path_factory.mktemp("whole")) as cluster:
        yield cluster


async def test_what_one_node_prefilled_another_decodes_exactly(split: Cluster, reference: Reference) -> None:
    prompts = [random_prompt(length, split.endpoint.vocabulary.size, "split") for length in (1, 31, 64, 200, 777)]
    for prompt, answer in zip(prompts, await split.endpoint.complete_all(prompts), strict=True):
        reference.assert_greedy(prompt, answer)
    pulled, served = await split.loads("pulled_total"), await split.loads("served_total")
    assert pulled[1] == served[0] == sum(-(-len(prompt) // 32) for prompt in prompts)


async def test_a_conversation_hits_what_the_other_node_decoded(split: Cluster, reference: Reference) -> None:
    prompt = random_prompt(100, split.endpoint.vocabulary.size, "conversation")
    first = await split.endpoint.complete(prompt, max_tokens=200)
    await split.endpoint.until_at_rest()
    longer = [*prompt, *first.token_ids, *random_prompt(50, split.endpoint.vocabulary.size, "next turn")]
    second = await split.endpoint.complete(longer)
    assert second.cached_tokens >= 256  # nearly all of the 300; the prompt alone has three whole blocks
    reference.assert_greedy(longer, second)
    assert (await split.loads("orphaned_blocks")) == [0, 0]


async def test_a_stream_survives_the_death_of_a_store_node(whole: Cluster) -> None:
    endpoint = whole.endpoint
    await endpoint.until(lambda members: len(members) == 6)
    prompt = random_prompt(100, endpoint.vocabulary.size, "a node dies")
    undisturbed = await endpoint.complete(prompt, MANY_TOKENS)
    received: list[int] = []
    async with aclosing(endpoint.stream(prompt, MANY_TOKENS)) as tokens:
        async for token in tokens:
            received.append(token)
            if len(received) == 20:
                busy = _decoding(await endpoint.until(_decoding))
                whole.parts.kill(f"store-{busy[-1]}")
    assert received == undisturbed.token_ids
    members = await endpoint.until_at_rest()
    assert all(not member.load["orphaned_blocks"] for member in members.values() if member.role == "store")


async def test_all_requests_finish_while_a_store_node_and_a_worker_of_the_other_node_are_killed(
    whole: Cluster, reference: Reference
) -> None:
    endpoint = whole.endpoint
    whole.parts.restore()
    await endpoint.until(lambda members: len(members) == 6)
    prompts = [random_prompt(100 + 20 * number, endpoint.vocabulary.size, "under load") for number in range(8)]
    answers = asyncio.gather(*(endpoint.try_complete(prompt, 300) for prompt in prompts))
    await endpoint.until(_decoding)
    whole.parts.kill("store-1")
    whole.parts.kill("prefill-0")
    whole.parts.start("prefill-0")
    for prompt, answer in zip(prompts, await answers, strict=True):
        if isinstance(answer, Answer):
            reference.assert_greedy(prompt, answer)
        else:
            assert answer.status in (429, 503) and answer.error["message"]
    whole.parts.restore()
    members = await endpoint.until(lambda members: len(members) == 6)
    await endpoint.until_at_rest()
    assert all(not member.load["orphaned_blocks"] for member in members.values() if member.role == "store")
    await endpoint.complete(prompts[0])


async def test_a_disk_that_fails_while_serving_is_a_metric_and_no_error(
    tiny_llama: Path, vocabulary: Vocabulary, reference: Reference, tmp_path: Path
) -> None:
    (tmp_path / "ssd" / "store-0").mkdir(parents=True)
    fields = {"nodes": 1, "dram_bytes": "1MiB", "ssd_folder": tmp_path / "ssd", "ssd_bytes": "64MiB"}
    with _cluster(tiny_llama, vocabulary, tmp_path, **fields) as cluster:
        endpoint = cluster.endpoint
        await endpoint.until(lambda members: len(members) == 3 and members["store-0"].load["ssd_state"] == "SSD_ON")
        for number in range(200):
            prompt = random_prompt(100, vocabulary.size, f"disk {number}")
            answer = await endpoint.complete(prompt, 4)
            if not number:
                assert await endpoint.metric("perigee_store_ssd_state") == 1
                # From here on the kernel refuses what the store node writes behind this place of a file.
                limit = 256 << 10
                resource.prlimit(cluster.parts.running["store-0"].pid, resource.RLIMIT_FSIZE, (limit, limit))
            if await endpoint.metric("perigee_store_ssd_state") == 2:
                break
        assert await endpoint.metric("perigee_store_ssd_state") == 2
        reference.assert_greedy(prompt, answer)
        assert await endpoint.metric("perigee_failed_attempts_total") == 0
        again = random_prompt(100, vocabulary.size, "afterwards")
        await endpoint.complete(again)
        assert (await endpoint.complete(again)).cached_tokens >= 96
        await endpoint.until_at_rest()


async def test_blocks_cross_by_the_mooncake_transfer_engine(
    tiny_llama: Path, vocabulary: Vocabulary, reference: Reference, tmp_path: Path
) -> None:
    _skip_without_mooncake()
    fields = {"transfer": "mooncake", "cluster_secret": SecretStr("a secret of this test alone")}
    with _cluster(tiny_llama, vocabulary, tmp_path, "decode-0", "prefill-1", **fields) as split:
        await split.endpoint.until(lambda members: len(members) == 4)
        prompts = [random_prompt(length, vocabulary.size, "mooncake") for length in (31, 200, 777)]
        for prompt, answer in zip(prompts, await split.endpoint.complete_all(prompts), strict=True):
            reference.assert_greedy(prompt, answer)
        pulled = await split.loads("pulled_total")
        assert pulled == [0, sum(-(-len(prompt) // 32) for prompt in prompts)]
        assert await split.endpoint.metric("perigee_store_remote_corrupt_blocks_total") == 0


async def test_up_with_two_nodes_makes_a_secret_that_their_blocks_are_guarded_by(
    tiny_llama: Path, vocabulary: Vocabulary, reference: Reference, tmp_path: Path
) -> None:
    flags = (f"--model={tiny_llama}", f"--served-model-name={MODEL}", "--dtype=float32", "--nodes=2")
    with started_cluster(tmp_path, *flags) as up:
        endpoint = Endpoint(up.wait_ready(), MODEL, vocabulary)
        prompts = [random_prompt(length, vocabulary.size, "secret") for length in (40, 200)]
        for prompt, answer in zip(prompts, await endpoint.complete_all(prompts), strict=True):
            reference.assert_greedy(prompt, answer)
        secrets = {child.environ().get("PERIGEE_CLUSTER_SECRET", "") for child in up.children().values()}
        assert len(secrets) == 1 and len(secrets.pop()) == 64
        store = up.children()["store-0"]
        (port,) = {c.laddr.port for c in store.net_connections("tcp4") if c.status == psutil.CONN_LISTEN}
        transfer = TcpTransfer(b"another secret than theirs")
        with pytest.raises(PeerRefused, match="secret"):
            await anext(transfer.pull(f"127.0.0.1:{port}", [Wanted(0, BlockKey(bytes(32)), memoryview(b""))], 0.0))
        await transfer.close()


def _skip_without_mooncake() -> None:
    with closing(Mapping(allocate(4096), 4096)) as mapping:
        try:
            MooncakeEngine("127.0.0.1", mapping.view(0, 4096)).close()
        except BackendMissing as error:
            pytest.skip(str(error))


def _decoding(members: Members) -> str:
    busy = [m.id for m in members.values() if m.role == "decode" and m.load["running_sequences"]]
    return busy[0] if busy else ""
