"""What several tests of workers share."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from perigee.kvstore import node
from perigee.kvstore.config import StoreConfig
from tests import tiny_moonlight
from tests.workers.sites import Expected, Site


@pytest.fixture(scope="session")
def tiny_moon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a seeded random Moonlight, in Hugging Face layout."""
    return tiny_moonlight.write(tmp_path_factory.mktemp("tiny-moonlight"))


@pytest.fixture(params=["llama", "moonlight"])
def checkpoint(request: pytest.FixtureRequest, tiny_llama: Path, tiny_moon: Path) -> Path:
    """A small model of each architecture in turn."""
    return tiny_llama if request.param == "llama" else tiny_moon


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
def expected(tiny_llama: Path) -> Expected:
    return Expected(tiny_llama)
