"""Clusters that run, and what their outputs are compared with. Each is started once for all tests that can share it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from perigee.kvstore.blocks import DType
from tests.cluster import cluster
from tests.e2e.endpoint import Endpoint, Vocabulary
from tests.e2e.reference import Reference

MODEL = "tiny"


@contextmanager
def up(
    directory: Path, model: Path, vocabulary: Vocabulary, *arguments: str, dtype: DType = "float32"
) -> Iterator[Endpoint]:
    """`perigee up`, once it is ready. Nothing that its workers do may have to be done again."""
    flags = (f"--model={model}", f"--served-model-name={MODEL}", f"--dtype={dtype}")
    with cluster(directory, *flags, *arguments) as started:
        endpoint = Endpoint(started.wait_ready(), MODEL, vocabulary)
        yield endpoint
        assert asyncio.run(endpoint.metric("perigee_failed_attempts_total")) == 0, started.log.read_text()


@pytest.fixture(scope="session")
def vocabulary(tiny_llama: Path) -> Vocabulary:
    return Vocabulary(tiny_llama)


@pytest.fixture(scope="session")
def reference(tiny_llama: Path) -> Reference:
    return Reference.load(tiny_llama)


@pytest.fixture(scope="package")
def tiny(tiny_llama: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """One prefill and one decode worker, which compute most prompts in one step."""
    with up(tmp_path_factory.mktemp("tiny"), tiny_llama, vocabulary, "--max-batched-tokens=2048") as endpoint:
        yield endpoint


@pytest.fixture(scope="package")
def pairs(tiny_llama: Path, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Two workers of each role, which compute prompts in small chunks."""
    flags = ("--prefill=2", "--decode=2", "--max-batched-tokens=48")
    with up(tmp_path_factory.mktemp("pairs"), tiny_llama, vocabulary, *flags) as endpoint:
        yield endpoint
