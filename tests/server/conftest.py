"""A front end on a real socket before a scripted cluster."""

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from perigee.scheduler import scheduler_pb2 as pb
from perigee.server.app import serve
from perigee.server.config import ServerConfig
from perigee.server.gateway import Gateway
from perigee.workers.engine.sequence import Token
from perigee.workers.messages import ModelCard
from perigee.workers.model.tokenizer import Tokenizer
from perigee.workers.wire import card_to_pb
from tests.server.fakes import FakeConductor, FakeWorker, store_state
from tests.small_tokenizer import END, write_tokenizer

CONTEXT = 256
BLOCK_TOKENS = 4


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def card(tokenizer: Tokenizer) -> ModelCard:
    return ModelCard(
        name="tiny",
        weights_digest="w",
        config_digest="c",
        tokenizer_digest="t",
        dtype="float32",
        block_tokens=BLOCK_TOKENS,
        max_context=CONTEXT,
        vocab_size=tokenizer.vocab_size,
        namespace=b"n" * 32,
        eos_token_ids=(tokenizer.encode(END)[0],),
    )


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A directory whose path is short enough for Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="pg") as directory:
        yield Path(directory)


@dataclass
class Cluster:
    """The scripted parts, and the front end before them."""

    conductor: FakeConductor
    prefill: FakeWorker
    decode: FakeWorker
    tokenizer: Tokenizer
    card: ModelCard
    sockets: Path
    url: str = ""

    def answers(self, text: str, eos: bool = False) -> None:
        """Every sequence gets this text, then the end-of-sequence token if `eos`."""
        self.answers_tokens([*self.tokenizer.encode(text), *([self.card.eos_token_ids[0]] if eos else [])])

    def answers_tokens(self, token_ids: Sequence[int]) -> None:
        tokens = [Token(token, -0.5, ((token, -0.5), (0, -2.0))) for token in token_ids]
        for worker in (self.prefill, self.decode):
            worker.answer = lambda work: tokens

    def client(self, **options: Any) -> AsyncOpenAI:
        return AsyncOpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})


@pytest.fixture
async def cluster(sockets: Path, tokenizer: Tokenizer, card: ModelCard) -> AsyncIterator[Cluster]:
    """The cluster without a front end."""
    conductor = FakeConductor(sockets / "conductor")
    prefill = FakeWorker(sockets / "p", "prefill-0", "prefill", card)
    decode = FakeWorker(sockets / "d", "decode-0", "decode", card)
    conductor.prefill, conductor.decode = prefill, decode
    conductor.state = pb.ClusterState(
        epoch=1, ready=True, card=card_to_pb(card), workers=[prefill.state(), decode.state()], stores=[store_state()]
    )
    parts = (conductor, prefill, decode)
    for part in parts:
        await part.up()
    prefill.eos = decode.eos = card.eos_token_ids[0]
    yield Cluster(conductor, prefill, decode, tokenizer, card, sockets)
    for part in parts:
        await part.down()


@contextlib.asynccontextmanager
async def fronted(cluster: Cluster, **settings: Any) -> AsyncIterator[Cluster]:
    """Puts a front end with these settings before the cluster."""
    config = ServerConfig(
        conductor=cluster.conductor.address,
        model="unused",
        **{"cluster_poll_s": 0.02, "shutdown_grace_s": 0, **settings},
    )
    listener = socket.create_server(("127.0.0.1", 0))
    cluster.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with Gateway.opened(config, cluster.tokenizer) as gateway:
        await gateway.conductor.refresh()
        serving = asyncio.create_task(serve(gateway, listener))
        try:
            yield cluster
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


@pytest.fixture
async def front(cluster: Cluster) -> AsyncIterator[Cluster]:
    """The cluster behind a front end as it is by default."""
    async with fronted(cluster):
        yield cluster


@pytest.fixture
async def client(front: Cluster) -> AsyncIterator[AsyncOpenAI]:
    async with front.client() as client:
        yield client
