"""Calls between processes, over real sockets, with the cluster's secret, another one, or none."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from perigee.kvstore import directory_pb2 as pb
from perigee.kvstore import directory_pb2_grpc as rpc
from perigee.kvstore.access import OPEN, Access
from perigee.kvstore.directory import InMemoryDirectory, Member, stay_joined, watch

OURS, THEIRS = Access(b"the secret of our cluster"), Access(b"the secret of another one")
STORE = Member("store-0", "1", "store", "127.0.0.1:1", 10, "here")


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[str]:
    """A directory that asks for our secret."""
    server = OURS.server()
    rpc.add_DirectoryServicer_to_server(InMemoryDirectory(), server)
    address = f"unix:{tmp_path}/directory.sock"
    server.add_insecure_port(address)
    await server.start()
    yield address
    await server.stop(grace=None)


async def test_who_has_the_secret_is_answered(target: str) -> None:
    joining = asyncio.create_task(stay_joined(target, STORE, OURS))
    async with contextlib.aclosing(watch(target, OURS)) as changes:
        async for members in changes:
            if members == (STORE,):
                break
    joining.cancel()
    await asyncio.wait([joining])


@pytest.mark.parametrize("access", [OPEN, THEIRS], ids=["no secret", "another secret"])
async def test_who_has_not_is_refused_whatever_it_calls(target: str, access: Access) -> None:
    async with access.channel(target) as channel:
        stub = rpc.DirectoryStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as watching:
            await stub.Watch(pb.WatchMembersRequest()).read()
        with pytest.raises(grpc.aio.AioRpcError) as joining:
            await stub.Join().read()
    for refused in (watching, joining):
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_the_secret_itself_is_neither_shown_nor_printed() -> None:
    assert OURS.cluster_secret.decode() not in OURS.token
    assert OURS.cluster_secret.hex() not in OURS.token
    assert "secret of our" not in repr(OURS)
