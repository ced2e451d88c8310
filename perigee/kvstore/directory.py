"""Who is in the cluster: the directory's state, its gRPC service, and how a member stays in it.

The directory in memory belongs to one process, which hosts it beside its other services. A member is in it for as long
as its stream is open, so whoever dies leaves at once; when the directory itself restarts, its members come back. A
target of the form redis://… stands for the directory of a cluster, which `redis_directory` keeps.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Protocol

import grpc

from perigee.kvstore import directory_pb2 as pb
from perigee.kvstore import directory_pb2_grpc as rpc
from perigee.kvstore import redis_directory
from perigee.kvstore.access import OPEN, Access
from perigee.kvstore.addresses import is_redis
from perigee.kvstore.members import Kind, Member

__all__ = [
    "Directory",
    "InMemoryDirectory",
    "Kind",
    "Member",
    "WatchedDirectory",
    "member_from_pb",
    "member_to_pb",
    "stay_joined",
    "watch",
]

_log = logging.getLogger(__name__)

_KIND_TO_PB: dict[Kind, pb.Member.Kind.ValueType] = {"store": pb.Member.STORE, "worker": pb.Member.WORKER}
_KIND_FROM_PB: dict[int, Kind] = {number: kind for kind, number in _KIND_TO_PB.items()}

_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.05, 2.0


class Directory(Protocol):
    """A directory as one sees it who follows the cluster."""

    @property
    def members(self) -> tuple[Member, ...]:
        """The members as last heard of, sorted by id."""

    def watch(self) -> AsyncGenerator[tuple[Member, ...], None]:
        """The members now, and again after changes; changes that follow each other quickly come as one."""


class InMemoryDirectory(rpc.DirectoryServicer):
    """The directory and its gRPC service. A member that joins again, restarted, takes the place of its former self."""

    def __init__(self) -> None:
        self._members: dict[str, tuple[object, Member]] = {}  # by id, with the stream that announced it
        self._changed = asyncio.Event()

    @property
    def members(self) -> tuple[Member, ...]:
        """The members now, sorted by id."""
        return tuple(member for _, (_, member) in sorted(self._members.items()))

    async def watch(self) -> AsyncGenerator[tuple[Member, ...], None]:
        """The members now, and again after changes; changes that follow each other quickly come as one."""
        while True:
            changed = self._changed
            yield self.members
            await changed.wait()

    async def Join(
        self,
        request_iterator: AsyncIterator[pb.Member],
        context: "grpc.aio.ServicerContext[pb.Member, pb.Joined]",
    ) -> AsyncIterator[pb.Joined]:
        stream = object()
        joined: set[str] = set()
        try:
            async for message in request_iterator:
                if message.kind not in _KIND_FROM_PB or not message.id or not message.incarnation:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "id, incarnation or kind is missing")
                self._put(stream, member_from_pb(message))
                joined.add(message.id)
                yield pb.Joined()
        finally:
            for member_id in joined:
                self._remove(stream, member_id)

    async def Watch(
        self,
        request: pb.WatchMembersRequest,
        context: "grpc.aio.ServicerContext[pb.WatchMembersRequest, pb.Members]",
    ) -> AsyncIterator[pb.Members]:
        async for members in self.watch():
            yield pb.Members(members=[member_to_pb(member) for member in members])

    def _put(self, stream: object, member: Member) -> None:
        self._members[member.id] = (stream, member)
        _log.info("member joined kind=%s id=%s address=%s pid=%d", member.kind, member.id, member.address, member.pid)
        self._notify()

    def _remove(self, stream: object, member_id: str) -> None:
        owner, member = self._members.get(member_id, (None, None))
        if owner is stream and member:
            del self._members[member_id]
            _log.info("member left kind=%s id=%s pid=%d", member.kind, member.id, member.pid)
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class WatchedDirectory:
    """A directory that is elsewhere. Its `members` are those that `watch`, which has to run, told last."""

    def __init__(self, target: str, access: Access) -> None:
        self._target = target
        self._access = access
        self._members: tuple[Member, ...] = ()

    @property
    def members(self) -> tuple[Member, ...]:
        return self._members

    async def watch(self) -> AsyncGenerator[tuple[Member, ...], None]:
        async with aclosing(watch(self._target, self._access)) as changes:
            async for self._members in changes:
                yield self._members


async def stay_joined(target: str, member: Member, access: Access = OPEN) -> None:
    """Keeps `member` in the directory at `target` until cancelled, through restarts of the directory."""
    if is_redis(target):
        await redis_directory.stay_joined(target, member, access.directory_password)
    else:
        await _stay_joined(target, member, access)


def watch(target: str, access: Access = OPEN) -> AsyncGenerator[tuple[Member, ...], None]:
    """The members in the directory at `target`, and again after each change, through restarts of the directory.

    While the directory is away nothing comes. One over gRPC starts empty when it is back, and fills again.
    """
    if is_redis(target):
        return redis_directory.watch(target, access.directory_password)
    return _watch(target, access)


async def _stay_joined(target: str, member: Member, access: Access) -> None:
    backoff_s = _FIRST_BACKOFF_S
    while True:
        async with _channel(target, access) as channel:
            call = rpc.DirectoryStub(channel).Join()
            try:
                await call.write(member_to_pb(member))
                async for _ in call:
                    backoff_s = _FIRST_BACKOFF_S
                    _log.info("joined directory=%s id=%s", target, member.id)
            except grpc.aio.AioRpcError as error:
                _log.warning("not in directory=%s id=%s error=%s %s", target, member.id, error.code(), error.details())
            except asyncio.InvalidStateError:  # what gRPC raises for a write to a call that has failed already
                _log.warning("not in directory=%s id=%s error=the call failed at once", target, member.id)
        await asyncio.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)


async def _watch(target: str, access: Access) -> AsyncGenerator[tuple[Member, ...], None]:
    backoff_s = _FIRST_BACKOFF_S
    while True:
        async with _channel(target, access) as channel:
            try:
                async for message in rpc.DirectoryStub(channel).Watch(pb.WatchMembersRequest()):
                    backoff_s = _FIRST_BACKOFF_S
                    yield tuple(member_from_pb(member) for member in message.members)
            except grpc.aio.AioRpcError as error:
                _log.warning("cannot watch directory=%s error=%s %s", target, error.code(), error.details())
        await asyncio.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)


def member_to_pb(member: Member) -> pb.Member:
    return pb.Member(
        id=member.id,
        incarnation=member.incarnation,
        kind=_KIND_TO_PB[member.kind],
        address=member.address,
        pid=member.pid,
        host=member.host,
        store=member.store,
        transfer_address=member.transfer_address,
    )


def member_from_pb(member: pb.Member) -> Member:
    return Member(
        id=member.id,
        incarnation=member.incarnation,
        kind=_KIND_FROM_PB[member.kind],
        address=member.address,
        pid=member.pid,
        host=member.host,
        store=member.store,
        transfer_address=member.transfer_address,
    )


def _channel(target: str, access: Access) -> grpc.aio.Channel:
    # Channels to one target otherwise share a connection, and with it gRPC's own, slower backoff.
    return access.channel(target, [("grpc.use_local_subchannel_pool", 1)])
