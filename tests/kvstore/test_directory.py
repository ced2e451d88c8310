"""Membership over real gRPC streams."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from perigee.kvstore import directory_pb2 as pb
from perigee.kvstore import directory_pb2_grpc
from perigee.kvstore.directory import Member, stay_joined, watch
from tests.kvstore.conftest import HostedDirectory, StartPython, host_directory

STORE = Member("store-0", "1", "store", "127.0.0.1:1", 10, "here")
WORKER = Member("prefill-0", "1", "worker", "127.0.0.1:2", 11, "here", "store-0")

_JOIN = """
import asyncio, sys
from perigee.kvstore.directory import Member, stay_joined
asyncio.run(stay_joined(sys.argv[1], Member("killed", "1", "worker", "nowhere:1", 1, "here")))
"""


@contextlib.asynccontextmanager
async def joined(target: str, *members: Member) -> AsyncIterator[list["asyncio.Task[None]"]]:
    tasks = [asyncio.create_task(stay_joined(target, member)) for member in members]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_members_come_and_go_and_watchers_hear_of_it(hosted_directory: HostedDirectory) -> None:
    seen: list[tuple[Member, ...]] = []
    async with (
        joined(hosted_directory.target, STORE, WORKER) as (_, worker),
        contextlib.aclosing(watch(hosted_directory.target)) as changes,
    ):
        async for members in changes:
            seen.append(members)
            if members == (WORKER, STORE):
                worker.cancel()
            elif members == (STORE,) and (WORKER, STORE) in seen:
                break
    assert seen[-2:] == [(WORKER, STORE), (STORE,)]
    assert await hosted_directory.until(lambda members: not members) == ()


async def test_a_member_that_is_killed_leaves(hosted_directory: HostedDirectory, start_python: StartPython) -> None:
    process = start_python(_JOIN, hosted_directory.target)
    await hosted_directory.until(lambda members: [member.id for member in members] == ["killed"])
    process.kill()
    await hosted_directory.until(lambda members: not members)


async def test_a_restarted_member_takes_the_place_of_its_former_self(hosted_directory: HostedDirectory) -> None:
    restarted = replace(STORE, incarnation="2", pid=os.getpid())
    async with joined(hosted_directory.target, STORE):
        await hosted_directory.until(lambda members: members == (STORE,))
        async with joined(hosted_directory.target, restarted):
            await hosted_directory.until(lambda members: members == (restarted,))
        await hosted_directory.until(lambda members: not members)


async def test_the_end_of_a_former_self_does_not_remove_its_successor(hosted_directory: HostedDirectory) -> None:
    restarted = replace(STORE, incarnation="2")
    async with joined(hosted_directory.target, STORE) as (former,):
        await hosted_directory.until(lambda members: members == (STORE,))
        async with joined(hosted_directory.target, restarted):
            await hosted_directory.until(lambda members: members == (restarted,))
            former.cancel()
            async with joined(hosted_directory.target, WORKER):  # its join comes after the other's end
                assert await hosted_directory.until(lambda members: WORKER in members) == (WORKER, restarted)


async def test_members_and_watchers_come_back_when_the_directory_restarts(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/directory.sock"
    async with joined(target, STORE, WORKER), contextlib.aclosing(watch(target)) as changes:
        for _ in range(2):
            async with host_directory(target):
                async for members in changes:
                    if members == (WORKER, STORE):
                        break


@pytest.mark.parametrize(
    "announced",
    [
        pb.Member(incarnation="1"),
        pb.Member(id="a"),
        pb.Member(id="a", incarnation="1", kind=pb.Member.Kind.ValueType(9)),
    ],
    ids=["no id", "no incarnation", "unknown kind"],
)
async def test_who_does_not_say_who_it_is_does_not_join(
    hosted_directory: HostedDirectory, announced: pb.Member
) -> None:
    async with grpc.aio.insecure_channel(hosted_directory.target) as channel:
        call = directory_pb2_grpc.DirectoryStub(channel).Join()
        await call.write(announced)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert hosted_directory.directory.members == ()
