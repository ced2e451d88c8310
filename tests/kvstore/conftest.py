"""A directory, and store nodes beside it: in the test's own event loop, or as processes that can be killed."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from perigee.kvstore import directory_pb2_grpc, node, store_pb2_grpc
from perigee.kvstore import store_pb2 as pb
from perigee.kvstore.client import StoreClient
from perigee.kvstore.config import StoreConfig
from perigee.kvstore.directory import InMemoryDirectory, Member
from perigee.kvstore.ssd import SegmentLog
from tests.kvstore.ssd_log import OpenLog, open_small

PAYLOAD_BYTES = 8192
BLOCK_TOKENS = 32
NUM_SLOTS = 16


@dataclass(frozen=True)
class HostedDirectory:
    directory: InMemoryDirectory
    target: str

    async def until(self, condition: Callable[[tuple[Member, ...]], bool]) -> tuple[Member, ...]:
        """The members as soon as they are as wanted."""
        async with contextlib.aclosing(self.directory.watch()) as changes:
            async for members in changes:
                if condition(members):
                    return members
        raise AssertionError("watching a directory never ends")


@contextlib.asynccontextmanager
async def host_directory(target: str) -> AsyncIterator[HostedDirectory]:
    directory = InMemoryDirectory()
    server = grpc.aio.server()
    directory_pb2_grpc.add_DirectoryServicer_to_server(directory, server)
    server.add_insecure_port(target)
    await server.start()
    try:
        yield HostedDirectory(directory, target)
    finally:
        await server.stop(grace=None)


@pytest.fixture
async def hosted_directory(tmp_path: Path) -> AsyncIterator[HostedDirectory]:
    async with host_directory(f"unix:{tmp_path}/directory.sock") as hosted:
        yield hosted


@pytest.fixture
def store_config(tmp_path: Path, hosted_directory: HostedDirectory) -> StoreConfig:
    return StoreConfig(
        socket=tmp_path / "store.sock", directory=hosted_directory.target, dram_bytes=NUM_SLOTS * PAYLOAD_BYTES + 100
    )


@dataclass(frozen=True)
class RunningNode:
    config: StoreConfig
    member: Member

    async def connect(self, payload_bytes: int = PAYLOAD_BYTES, block_tokens: int = BLOCK_TOKENS) -> StoreClient:
        return await connect_to(self.config.socket, payload_bytes, block_tokens)

    @contextlib.asynccontextmanager
    async def stub(self) -> AsyncIterator["store_pb2_grpc.StoreNodeAsyncStub"]:
        async with grpc.aio.insecure_channel(self.member.address) as channel:
            yield store_pb2_grpc.StoreNodeStub(channel)

    async def status(self) -> pb.StoreStatus:
        async with self.stub() as stub:
            return await stub.Status(pb.StatusRequest())


async def connect_to(path: Path, payload_bytes: int = PAYLOAD_BYTES, block_tokens: int = BLOCK_TOKENS) -> StoreClient:
    return await StoreClient.connect(
        path, worker_id="worker", incarnation="1", payload_bytes=payload_bytes, block_tokens=block_tokens
    )


@pytest.fixture
async def running_node(store_config: StoreConfig, hosted_directory: HostedDirectory) -> AsyncIterator[RunningNode]:
    """A store node in the test's event loop."""
    serving = asyncio.create_task(node.run(store_config))
    (member,) = await hosted_directory.until(lambda members: len(members) == 1)
    yield RunningNode(store_config, member)
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


Connect = Callable[[], Awaitable[StoreClient]]


@pytest.fixture
async def connect(running_node: RunningNode) -> AsyncIterator[Connect]:
    """Opens clients of the running node, and closes them at the end."""
    clients: list[StoreClient] = []

    async def connect_one() -> StoreClient:
        clients.append(await running_node.connect())
        return clients[-1]

    yield connect_one
    for client in clients:
        await client.close()


StartPython = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_python() -> Iterator[StartPython]:
    """Starts Python processes, and ends those that are left."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", program, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def open_log(tmp_path: Path) -> Iterator[OpenLog]:
    """Opens small segment logs, in the test's folder unless told otherwise, and closes them at the end."""
    with contextlib.ExitStack() as closing:

        def open_one(folder: Path = tmp_path, **options: Any) -> SegmentLog:
            return closing.enter_context(contextlib.closing(open_small(folder, **options)))

        yield open_one
