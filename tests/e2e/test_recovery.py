"""A worker may die at any time: its requests go on elsewhere, exactly where they were."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import aclosing
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

NUM_MEMBERS = 5
MANY_TOKENS = 1500  # of a stream that goes on while workers are found and killed


@dataclass(frozen=True, slots=True)
class Cluster:
    """Two workers of each role, which compute prompts in small chunks so that there is time to kill one."""

    parts: Parts
    endpoint: Endpoint

    async def until_busy(self, role: str, field: str) -> str:
        """The worker of this role whose report first shows more than nothing in `field`."""
        members = await self.endpoint.until(lambda members: _busy(members, role, field))
        return _busy(members, role, field)[0]


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    config = UpConfig(
        port=free_port(),
        model=str(tiny_llama),
        served_model_name=MODEL,
        dtype="float32",
        prefill=2,
        decode=2,
        max_batched_tokens=48,
    )
    with parts(config, tmp_path_factory.mktemp("parts")) as started:
        url = f"http://127.0.0.1:{config.port}"
        wait_healthy(url, started)
        yield Cluster(started, Endpoint(url, MODEL, vocabulary))


@pytest.fixture(autouse=True)
async def _complete(cluster: Cluster) -> None:
    """Whoever a test before killed and started again has joined."""
    await cluster.endpoint.until(lambda members: len(members) == NUM_MEMBERS)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 17}], ids=["greedy", "sampled"])
async def test_a_stream_goes_on_without_its_decode_worker_and_no_token_comes_twice(
    cluster: Cluster, sampling: Mapping[str, float]
) -> None:
    endpoint = cluster.endpoint
    prompt = random_prompt(100, endpoint.vocabulary.size, "decode dies")
    undisturbed = await endpoint.complete(prompt, MANY_TOKENS, **sampling)
    lost = await endpoint.metric("perigee_failed_attempts_total", code="lost")
    received = []
    async with aclosing(endpoint.stream(prompt, MANY_TOKENS, **sampling)) as tokens:
        async for token in tokens:
            received.append(token)
            if len(received) == 20:
                victim = await cluster.until_busy("decode", "running_sequences")
                cluster.parts.kill(victim)
    assert received == undisturbed.token_ids
    assert await endpoint.metric("perigee_failed_attempts_total", code="lost") == lost + 1
    await assert_nothing_is_left(endpoint)
    cluster.parts.start(victim)


async def test_prompts_are_computed_elsewhere_when_their_prefill_worker_dies(
    cluster: Cluster, reference: Reference
) -> None:
    endpoint = cluster.endpoint
    prompts = [random_prompt(3000 + index, endpoint.vocabulary.size, "prefill dies") for index in range(4)]
    answers = asyncio.ensure_future(endpoint.complete_all(prompts))
    victim = await cluster.until_busy("prefill", "context_tokens")
    cluster.parts.kill(victim)
    for prompt, answer in zip(prompts, await answers, strict=True):
        reference.assert_greedy(prompt, answer)
    assert await endpoint.metric("perigee_failed_attempts_total", code="lost") > 0
    await assert_nothing_is_left(endpoint)
    cluster.parts.start(victim)


async def test_a_stream_waits_for_a_decode_worker_when_none_is_left(cluster: Cluster) -> None:
    endpoint = cluster.endpoint
    prompt = random_prompt(50, endpoint.vocabulary.size, "all die")
    undisturbed = await endpoint.complete(prompt, MANY_TOKENS)
    received = []
    async with aclosing(endpoint.stream(prompt, MANY_TOKENS)) as tokens:
        async for token in tokens:
            received.append(token)
            if len(received) == 20:
                for name in ("decode-0", "decode-1"):
                    cluster.parts.kill(name)
                await cluster.endpoint.until(lambda members: len(members) == NUM_MEMBERS - 2)
                cluster.parts.start("decode-1")
    assert received == undisturbed.token_ids
    await assert_nothing_is_left(endpoint)


async def assert_nothing_is_left(endpoint: Endpoint) -> None:
    """What the dead held is free again, as is what the living held for its sake."""
    members = await endpoint.until_at_rest()
    assert members["store-0"].load["orphaned_blocks"] == 0


def _busy(members: Members, role: str, field: str) -> list[str]:
    return [name for name, member in members.items() if member.role == role and member.load[field] > 0]
