"""A checkpoint of Moonlight-16B-A3B's own shape, but for the number of its layers: loaded, served, compared."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import moonlight_16b
from tests.e2e.conftest import up
from tests.e2e.endpoint import Endpoint, Vocabulary
from tests.e2e.prompts import random_prompt
from tests.e2e.reference import Reference

pytestmark = pytest.mark.slow

NUM_LAYERS = 2  # one without experts, one with
LENGTHS = (5, 100, 400)
PEAK = 1.15  # of the weights


@dataclass(frozen=True, slots=True)
class Checkpoint:
    directory: Path
    weight_bytes: int


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    directory = tmp_path_factory.mktemp("moonlight-16b")
    yield Checkpoint(directory, moonlight_16b.write(directory, NUM_LAYERS))
    shutil.rmtree(directory)


def test_loading_takes_hardly_more_memory_than_the_weights(checkpoint: Checkpoint) -> None:
    command = [sys.executable, "-m", "tests.workers.loading_peak", str(checkpoint.directory)]
    peak = int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert checkpoint.weight_bytes <= peak <= PEAK * checkpoint.weight_bytes


@pytest.fixture
def endpoint(checkpoint: Checkpoint, tmp_path: Path) -> Iterator[Endpoint]:
    vocabulary = Vocabulary(checkpoint.directory)
    flags = ("--kv-tokens=2048", "--dram-bytes=64MiB")
    with up(tmp_path, checkpoint.directory, vocabulary, *flags, dtype="bfloat16") as started:
        yield started


async def test_tokens_are_as_likely_as_for_transformers(endpoint: Endpoint, checkpoint: Checkpoint) -> None:
    prompts = [random_prompt(length, endpoint.vocabulary.size, "16b") for length in LENGTHS]
    first = await endpoint.complete_all(prompts)
    second = await endpoint.complete_all(prompts)
    assert [answer.cached_tokens for answer in second] == [len(prompt) - 1 for prompt in prompts]
    reference = Reference.load(checkpoint.directory, torch.bfloat16)
    for prompt, *answers in zip(prompts, first, second, strict=True):
        for answer in answers:
            reference.assert_probable(prompt, answer)
