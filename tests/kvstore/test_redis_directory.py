"""Membership in a real Redis, which is also killed."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from perigee.kvstore.access import Access
from perigee.kvstore.directory import Member, WatchedDirectory, stay_joined, watch
from tests.kvstore.conftest import StartPython
from tests.redis_server import RedisServer, redis_server

PASSWORD = "open sesame, it is me"
ACCESS = Access(directory_password=PASSWORD)

# On a busy machine Redis's client now and then leaves a connection to the garbage collector, when its server was killed
# or hung: the warning comes in whatever test runs then. Which step of it loses the connection has not been found.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TTL_S = 2.0  # no busy machine keeps a living member from renewing its lease for so long

STORE = Member("store-0", "1", "store", "10.0.0.7:1", 10, "here")
WORKER = Member("prefill-0", "1", "worker", "10.0.0.7:2", 11, "here", "store-0")

Members = tuple[Member, ...]

_JOIN = """
import asyncio, sys
from perigee.kvstore.directory import Member, stay_joined
from perigee.kvstore.access import Access
member = Member("killed", "1", "worker", "nowhere:1", 1, "here")
asyncio.run(stay_joined(sys.argv[1], member, Access(directory_password=sys.argv[2])))
"""


@pytest.fixture(scope="module")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis"), PASSWORD) as server:
        yield server


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One that the test may kill."""
    with redis_server(tmp_path, PASSWORD) as server:
        yield server


_prefixes = (f"test-{number}" for number in itertools.count())


def target_in(server: RedisServer) -> str:
    """A directory of its own."""
    return f"redis://{server.address}/0?prefix={next(_prefixes)}&ttl_s={TTL_S}"


@pytest.fixture
def target(shared_redis: RedisServer) -> str:
    return target_in(shared_redis)


@contextlib.asynccontextmanager
async def joined(target: str, *members: Member) -> AsyncIterator[list["asyncio.Task[None]"]]:
    tasks = [asyncio.create_task(stay_joined(target, member, ACCESS)) for member in members]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Seen:
    """What a watcher hears, one after the other."""

    def __init__(self) -> None:
        self.all: list[Members] = []
        self._new: asyncio.Queue[Members] = asyncio.Queue()

    async def listen(self, target: str, access: Access) -> None:
        async for members in watch(target, access):
            self.all.append(members)
            self._new.put_nowait(members)

    async def until(self, condition: Callable[[Members], bool]) -> Members:
        while not condition(members := await self._new.get()):
            pass
        return members

    async def nothing_for(self, wait_s: float) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(self._new.get(), wait_s)


@contextlib.asynccontextmanager
async def watching(target: str, access: Access = ACCESS) -> AsyncIterator[Seen]:
    seen = Seen()
    listening = asyncio.create_task(seen.listen(target, access))
    try:
        yield seen
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def test_members_come_and_go_and_watchers_hear_of_it(target: str) -> None:
    async with watching(target) as seen:
        async with joined(target, STORE, WORKER) as (_, worker):
            await seen.until(lambda members: members == (WORKER, STORE))
            worker.cancel()
            assert await seen.until(lambda members: len(members) == 1) == (STORE,)
        await seen.until(lambda members: not members)


async def test_members_stay_for_longer_than_a_lease(target: str) -> None:
    async with joined(target, STORE), watching(target) as seen:
        await seen.until(lambda members: members == (STORE,))
        await seen.nothing_for(1.5 * TTL_S)


async def test_a_member_that_is_killed_leaves_with_its_lease(target: str, start_python: StartPython) -> None:
    async with watching(target) as seen:
        process = start_python(_JOIN, target, PASSWORD)
        await seen.until(lambda members: [member.id for member in members] == ["killed"])
        process.kill()
        await seen.until(lambda members: not members)


async def test_a_restarted_member_takes_the_place_of_its_former_self_which_stays_out(target: str) -> None:
    restarted = replace(STORE, incarnation="2")
    async with watching(target) as seen, joined(target, STORE) as (former,):
        await seen.until(lambda members: members == (STORE,))
        async with joined(target, restarted):
            await seen.until(lambda members: members == (restarted,))
            await seen.nothing_for(TTL_S)  # in which both renew their leases three times
            former.cancel()
            await asyncio.wait([former])
            async with joined(target, WORKER):  # comes after the former's end, which has removed nobody
                assert await seen.until(lambda members: WORKER in members) == (WORKER, restarted)


async def test_a_former_self_that_outlives_its_successor_is_back(target: str) -> None:
    async with watching(target) as seen, joined(target, STORE):
        await seen.until(lambda members: members == (STORE,))
        async with joined(target, replace(STORE, incarnation="2")):
            await seen.until(lambda members: bool(members) and members != (STORE,))
        await seen.until(lambda members: members == (STORE,))


async def test_a_redis_that_is_killed_takes_nobody_with_it(redis: RedisServer) -> None:
    target = target_in(redis)
    async with watching(target) as seen, joined(target, STORE, WORKER):
        await seen.until(lambda members: members == (WORKER, STORE))
        heard = len(seen.all)
        redis.kill()
        async with joined(target, replace(WORKER, id="decode-0")):  # starts while Redis is away
            redis.start()
            await seen.until(lambda members: len(members) == 3)
            assert all(len(members) >= 2 for members in seen.all[heard:])
        # Long after: the first two are in it because they announced themselves again, and only the third is not.
        await seen.until(lambda members: members == (WORKER, STORE))


async def test_who_dies_while_redis_is_away_is_missed_in_the_end(redis: RedisServer) -> None:
    target = target_in(redis)
    async with watching(target) as seen, joined(target, STORE):
        async with joined(target, WORKER):
            await seen.until(lambda members: members == (WORKER, STORE))
            redis.kill()
        redis.start()
        assert await seen.until(lambda members: len(members) < 2) == (STORE,)


async def test_a_redis_that_hangs_takes_nobody_with_it(redis: RedisServer) -> None:
    target = target_in(redis)
    async with watching(target) as seen, joined(target, STORE):
        await seen.until(lambda members: members == (STORE,))
        with redis.paused(), pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5 * TTL_S):
                await seen.until(lambda members: True)
        async with joined(target, WORKER):
            await seen.until(lambda members: WORKER in members)
    assert all(STORE in members for members in seen.all[1:])


async def test_the_wrong_password_keeps_one_out_but_not_for_good(redis: RedisServer) -> None:
    target = target_in(redis)
    waiting = asyncio.create_task(stay_joined(target, STORE, Access(directory_password="wrong")))
    async with watching(target) as seen, joined(target, WORKER):
        assert await seen.until(bool) == (WORKER,)
        redis.kill()
        redis.password = "wrong"
        redis.start()
        async with watching(target, Access(directory_password="wrong")) as seen_by_it:
            assert await seen_by_it.until(bool) == (STORE,)
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_a_watcher_with_the_wrong_password_ends_whenever_it_is_cancelled(target: str) -> None:
    async def watcher() -> None:
        async for _ in watch(target, Access(directory_password="wrong")):
            pass

    async def cancelled_after(seconds: float) -> bool:
        task = asyncio.create_task(watcher())
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    for _ in range(5):
        assert all(await asyncio.gather(*(cancelled_after(number / 500) for number in range(40))))


async def test_directories_with_other_prefixes_share_nothing(shared_redis: RedisServer) -> None:
    one, other = target_in(shared_redis), target_in(shared_redis)
    async with joined(one, STORE), watching(one) as here, watching(other) as there:
        await here.until(lambda members: members == (STORE,))
        assert await there.until(lambda members: True) == ()


async def test_what_cannot_be_read_is_no_member_and_what_says_more_is_one(
    target: str, shared_redis: RedisServer
) -> None:
    async with joined(target, STORE), watching(target) as seen:
        await seen.until(lambda members: members == (STORE,))
        prefix = target.partition("prefix=")[2].partition("&")[0]
        async with Redis(port=shared_redis.port, password=PASSWORD) as client:
            newer = (
                '{"id": "new", "incarnation": "1", "kind": "store", "address": "a", "pid": 1, "host": "h", "more": 1}'
            )
            await client.hset(f"{{{prefix}}}:members", mapping={"x": "{}", "y": "[", "new": newer})
        members = await seen.until(lambda members: len(members) > 1)
        assert [member.id for member in members] == ["new", "store-0"]


async def test_nothing_is_left_in_redis_when_all_members_are_gone(target: str, shared_redis: RedisServer) -> None:
    prefix = target.partition("prefix=")[2].partition("&")[0]
    async with joined(target, STORE), watching(target) as seen:
        await seen.until(lambda members: members == (STORE,))
    async with Redis(port=shared_redis.port, password=PASSWORD) as client:
        assert [key async for key in client.scan_iter(f"*{prefix}*")] == []


async def test_a_watched_directory_knows_its_members(target: str) -> None:
    directory = WatchedDirectory(target, ACCESS)
    assert directory.members == ()
    async with joined(target, STORE), contextlib.aclosing(directory.watch()) as changes:
        async for members in changes:
            assert directory.members == members
            if members == (STORE,):
                break
