"""The Conductor itself moves a worker to the other pool, under a load that needs it there."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import up
from tests.e2e.endpoint import Answer, Endpoint, Members, Vocabulary
from tests.e2e.prompts import random_prompt
from tests.e2e.reference import Reference

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trio(tiny_llama: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Two prefill workers and one decode worker, with room for four sequences each."""
    flags = ("--prefill=2", "--decode=1", "--max-sequences=4", "--admission=none", "--role-hold-s=1")
    with up(tmp_path_factory.mktemp("trio"), tiny_llama, vocabulary, *flags) as endpoint:
        yield endpoint


def decoders(members: Members) -> list[str]:
    return sorted(name for name, member in members.items() if member.role == "decode")


async def test_a_lasting_load_of_long_answers_gets_a_second_decode_worker(trio: Endpoint, reference: Reference) -> None:
    assert decoders(await trio.until(lambda members: len(members) == 4)) == ["decode-0"]
    moved = asyncio.Event()
    prompts = [random_prompt(20 + number, trio.vocabulary.size, "long answers") for number in range(6)]

    async def keep_asking(prompt: list[int]) -> list[Answer]:
        answers = []
        while not moved.is_set():
            answers.append(await trio.complete(prompt, 200))
        return answers

    asking = [asyncio.ensure_future(keep_asking(prompt)) for prompt in prompts]
    members = await trio.until(lambda members: len(decoders(members)) == 2)
    worker = next(name for name in decoders(members) if name != "decode-0")
    await trio.until(lambda members: members[worker].load["steps_total"] > 100)
    moved.set()
    for prompt, answers in zip(prompts, await asyncio.gather(*asking), strict=True):
        assert {len(answer.token_ids) for answer in answers} == {200}
        assert all(answer.token_ids == answers[0].token_ids for answer in answers)
        reference.assert_greedy(prompt, answers[-1])
    assert await trio.metric("perigee_failed_attempts_total") == 0
    assert await trio.metric("perigee_role_changes_total") >= 1
    await trio.until_at_rest()
