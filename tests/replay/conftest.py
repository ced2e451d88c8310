"""The real traces, if they are at hand, and an endpoint to replay against."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.replay.scripted_endpoint import ScriptedEndpoint, serve

TRACES = Path(__file__).parents[3] / "shared" / "traces"


def _trace(name: str) -> Path:
    path = TRACES / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="session")
def mooncake_path() -> Path:
    return _trace("mooncake_conversation.jsonl")


@pytest.fixture(scope="session")
def azure_path() -> Path:
    return _trace("azure_conv_2023.csv")


@pytest.fixture
async def endpoint() -> AsyncIterator[ScriptedEndpoint]:
    async with serve(ScriptedEndpoint()) as served:
        yield served
