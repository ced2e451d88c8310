"""Two store nodes with workers of their own. Their blocks reach each other over TCP alone."""

from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from perigee.up import UpConfig
from tests.e2e.conftest import MODEL
from tests.e2e.endpoint import Endpoint, Members, Vocabulary
from tests.e2e.parts import Parts, free_port, parts, wait_healthy
from tests.e2e.prompts import random_prompt
from tests.e2e.reference import Reference

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Cluster:
    parts: Parts
    endpoint: Endpoint

    async def loads(self, field: str) -> list[int]:
        """What both store nodes say of this, once nothing is under way."""
        members = await self.endpoint.until_at_rest()
        return [members[name].load[field] for name in ("store-0", "store-1")]


@contextmanager
def _cluster(model: Path, vocabulary: Vocabulary, directory: Path, *without: str) -> Iterator[Cluster]:
    config = UpConfig(
        port=free_port(), model=str(model), served_model_name=MODEL, dtype="float32", nodes=2, max_batched_tokens=48
    )
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
    undisturbed = await endpoint.complete(prompt, 600)
    received: list[int] = []
    async with aclosing(endpoint.stream(prompt, 600)) as tokens:
        async for token in tokens:
            received.append(token)
            if len(received) == 20:
                busy = _decoding(await endpoint.until(_decoding))
                whole.parts.kill(f"store-{busy[-1]}")
    assert received == undisturbed.token_ids
    members = await endpoint.until_at_rest()
    assert all(not member.load["orphaned_blocks"] for member in members.values() if member.role == "store")


def _decoding(members: Members) -> str:
    busy = [m.id for m in members.values() if m.role == "decode" and m.load["running_sequences"]]
    return busy[0] if busy else ""
