"""What the Conductor wants moved is carried out by real store nodes and a worker, and holds up nothing."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from perigee.kvstore.directory import Member
from perigee.scheduler.balance.base import Move
from perigee.scheduler.commands import Replicate, SetRole, Trim
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.driver import Driver
from perigee.scheduler.events import Tick
from perigee.scheduler.ids import NodeId, WorkerId
from perigee.scheduler.mover import Mover
from perigee.scheduler.policies import make_policies
from perigee.scheduler.recording.journal import Journal
from perigee.scheduler.view import ClusterView
from perigee.workers import worker_pb2
from tests.kvstore.conftest import HostedDirectory, hosted_directory  # noqa: F401  # a fixture
from tests.kvstore.keys import ROOT, chain
from tests.kvstore.nodes import acquainted, config_of, put, running
from tests.scheduler.fakes import FakeWorker, living, until


class SwitchingWorker(FakeWorker):
    """Changes its role as it is told."""

    async def SetRole(
        self,
        request: worker_pb2.SetRoleRequest,
        context: "grpc.aio.ServicerContext[worker_pb2.SetRoleRequest, worker_pb2.RoleSet]",
    ) -> worker_pb2.RoleSet:
        self.say(role=request.role)
        return worker_pb2.RoleSet()


class Scripted:
    """A balance that wants what it is given to want, once."""

    makes_copies = False

    def __init__(self) -> None:
        self.moves: list[Move] = []

    def tick(self, view: ClusterView, now: float) -> list[Move]:
        moves, self.moves = self.moves, []
        return moves


@asynccontextmanager
async def driving(balance: Scripted, directory: HostedDirectory) -> AsyncIterator[Driver]:
    policies = replace(make_policies(), balance=balance)
    driver = Driver(Conductor(policies), directory.directory, 3600.0, Journal())
    task = asyncio.create_task(driver.run())
    try:
        yield driver
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_copies_are_made_and_trimmed_and_roles_set_as_the_conductor_says(
    tmp_path: Path,
    hosted_directory: HostedDirectory,  # noqa: F811
) -> None:
    balance, worker, keys = Scripted(), SwitchingWorker("worker", "prefill"), tuple(chain("hot", 5))
    near, far = (running(config_of(hosted_directory, tmp_path, name), hosted_directory) for name in ("near", "far"))
    async with (
        near as store,
        far as origin,
        living(worker, f"unix:{tmp_path}/worker.sock", hosted_directory.target),
        driving(balance, hosted_directory) as driver,
    ):
        await acquainted(store, origin)
        here, there = await store.connect(), await origin.connect()
        (await put(there, keys)).release()
        view = driver.conductor.view

        async def knows() -> bool | None:
            return (len(view.stores) == 2 and bool(view.workers)) or None

        await until(knows)

        async def resident() -> int:
            return sum(await here.lookup(keys))

        balance.moves = [
            Replicate(NodeId("near"), NodeId("far"), ROOT, keys),
            SetRole(WorkerId("worker"), "1", "decode"),
        ]
        driver.emit(Tick())

        async def done() -> bool | None:
            return (await resident() == 5 and view.workers[WorkerId("worker")].report.role == "decode") or None  # type: ignore[union-attr]

        await until(done)
        balance.moves = [Trim(NodeId("near"), keys)]
        driver.emit(Tick())

        async def trimmed() -> bool | None:
            return await resident() == 0 or None

        await until(trimmed)
        await here.close()
        await there.close()


@pytest.fixture
async def mover() -> AsyncIterator[Mover]:
    each = Mover()
    yield each
    await each.close()


def _member(address: str) -> Member:
    return Member("worker", "1", "worker", address, 1, "here", "store-0")


SET_ROLE = SetRole(WorkerId("worker"), "1", "decode")


async def test_what_fails_is_a_warning_that_names_it(
    mover: Mover, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mover.start(SET_ROLE, _member(f"unix:{tmp_path}/nobody.sock"))

    async def failed() -> bool | None:
        return (
            any("move failed set_role worker=worker role=decode code=UNAVAILABLE" in m for m in caplog.messages) or None
        )

    await until(failed)
    assert [record.levelno for record in caplog.records if record.name.startswith("perigee")] == [logging.WARNING]


@pytest.mark.parametrize("member", [None, _member("unix:/nowhere")], ids=["left", "another incarnation"])
async def test_a_move_for_who_has_left_is_dropped(
    mover: Mover, member: Member | None, caplog: pytest.LogCaptureFixture
) -> None:
    mover.start(replace(SET_ROLE, incarnation="2"), member)
    assert "move dropped set_role worker=worker role=decode error=it has left" in caplog.messages
    assert mover.num_under_way == 0


async def test_nodes_that_hang_do_not_pile_up_calls(
    mover: Mover, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = await asyncio.start_unix_server(lambda reader, writer: None, tmp_path / "hangs.sock")
    for _ in range(100):
        mover.start(SET_ROLE, _member(f"unix:{tmp_path}/hangs.sock"))
    assert mover.num_under_way == 64
    assert sum("move dropped" in message for message in caplog.messages) == 36
    await mover.close()
    assert mover.num_under_way == 0
    server.close()
