"""The Conductor's process over real sockets, among scripted workers and store nodes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from perigee.kvstore import node
from perigee.kvstore.config import StoreConfig
from perigee.scheduler import scheduler_pb2 as pb
from perigee.scheduler import scheduler_pb2_grpc as rpc
from perigee.scheduler import service
from perigee.scheduler.config import ConductorConfig
from perigee.scheduler.errors import SchedulerError
from perigee.workers.engine.sequence import Ref
from perigee.workers.wire import ref_to_pb
from tests.kvstore import payloads
from tests.kvstore.conftest import PAYLOAD_BYTES, connect_to
from tests.scheduler.cluster import CARD, ROOT, keys
from tests.scheduler.fakes import FakeStore, FakeWorker, FrontEnd, arrived, joined, living, serving, until


class Running:
    """A Conductor and what is said to it from outside."""

    def __init__(self, folder: Path, stub: "rpc.ConductorAsyncStub") -> None:
        self.folder = folder
        self.stub = stub

    @property
    def target(self) -> str:
        return self.address("conductor")

    def address(self, name: str) -> str:
        return f"unix:{self.folder / name}"

    def living(self, fake: FakeWorker | FakeStore, name: str) -> AbstractAsyncContextManager[None]:
        return living(fake, self.address(name), self.target)

    def front_end(self) -> FrontEnd:
        return FrontEnd(self.stub)

    async def state(self) -> pb.ClusterState:
        return await self.stub.Cluster(pb.ClusterRequest(), wait_for_ready=True)

    async def state_when(self, condition: Callable[[pb.ClusterState], bool]) -> pb.ClusterState:
        """The first state of which this is true."""

        async def probe() -> pb.ClusterState | None:
            state = await self.state()
            return state if condition(state) else None

        return await until(probe)

    async def ready(self) -> pb.ClusterState:
        return await self.state_when(lambda state: state.ready)


@asynccontextmanager
async def conductor(folder: Path) -> AsyncIterator[Running]:
    target = f"unix:{folder / 'conductor'}"
    task = asyncio.create_task(service.run(ConductorConfig(listen=target, tick_s=0.05)))
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            yield Running(folder, rpc.ConductorStub(channel))
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with conductor(tmp_path) as each:
        yield each


@pytest.fixture
async def cluster(running: Running) -> AsyncIterator[Running]:
    """One store node, one prefill and one decode worker, all idle."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running.living(FakeStore(), "store"))
        await stack.enter_async_context(running.living(FakeWorker("p0", "prefill"), "p0"))
        await stack.enter_async_context(running.living(FakeWorker("d0", "decode"), "d0"))
        await running.ready()
        yield running


async def test_a_request_is_dispatched_and_proceeds(cluster: Running) -> None:
    front_end = cluster.front_end()
    command = await front_end.ask(arrived("r"))
    assert command.ref == ref_to_pb(Ref("r"))
    assert command.epoch > 0
    assert command.dispatch.prefill == pb.WorkerAddress(id="p0", address=cluster.address("p0"), incarnation="1")
    assert command.dispatch.decode == pb.WorkerAddress(id="d0", address=cluster.address("d0"), incarnation="1")
    assert (command.dispatch.prefill_source, command.dispatch.decode_source) == ("", "")
    assert command.dispatch.predicted_ttft_s > 0
    done = await front_end.ask(pb.ServerEvent(ref=command.ref, prefill_done=pb.PrefillDone(compute_s=0.1)))
    assert done.HasField("proceed")


async def test_a_prompt_of_128k_tokens_is_dispatched(running: Running) -> None:
    num_tokens = 1 << 17
    worker = FakeWorker("m0", "mixed", free_pages=10_000, total_pages=10_000)
    async with (
        running.living(FakeStore(held=keys(num_tokens)), "store"),
        running.living(worker, "m0"),
    ):
        await running.ready()
        front_end = running.front_end()
        cached = await front_end.ask(arrived("r", num_tokens))
        other = await front_end.ask(arrived("s", num_tokens, salt=1))
        assert cached.dispatch.prefill.id == other.dispatch.prefill.id == "m0"
        assert cached.dispatch.predicted_ttft_s < other.dispatch.predicted_ttft_s / 10


async def test_an_empty_cluster_is_not_ready_and_rejects(running: Running) -> None:
    state = await running.state()
    assert (state.ready, len(state.workers), len(state.stores), state.HasField("card")) == (False, 0, 0, False)
    command = await running.front_end().ask(arrived("r"))
    assert command.reject.reason == pb.Reject.UNAVAILABLE


async def test_the_clusters_state_tells_of_every_member(cluster: Running) -> None:
    state = await cluster.ready()
    workers = {each.member.id: each for each in state.workers}
    assert sorted(workers) == ["d0", "p0"]
    assert (workers["p0"].member.pid, workers["p0"].member.address) == (4321, cluster.address("p0"))
    assert (workers["p0"].report.role, workers["p0"].report.total_pages) == ("prefill", 100)
    assert state.card.weights_digest == "w"
    (store,) = state.stores
    assert (store.member.id, store.member.pid, store.status.num_slots) == ("store-0", 1234, 77)


async def test_a_store_node_that_does_not_answer_is_shown_without_status(running: Running) -> None:
    store = FakeStore()
    store.answers_status = False
    async with running.living(store, "store"):
        state = await running.state_when(lambda state: len(state.stores) == 1)
        assert not state.stores[0].HasField("status")


async def test_a_worker_that_died_gets_nothing_until_it_is_back_as_another_incarnation(running: Running) -> None:
    front_end = running.front_end()
    async with running.living(FakeStore(), "store"), running.living(FakeWorker("p0", "prefill"), "p0"):
        async with running.living(FakeWorker("d0", "decode", "first"), "d0"):
            await running.ready()
            first = await front_end.ask(arrived("r"))
            assert first.dispatch.decode.incarnation == "first"
        await running.state_when(lambda state: not state.ready)
        rejected = await front_end.ask(arrived("r", attempt=1))
        assert rejected.reject.reason == pb.Reject.UNAVAILABLE
        async with running.living(FakeWorker("d0", "decode", "second"), "d0"):
            await running.ready()
            second = await front_end.ask(arrived("r", attempt=2))
            assert second.dispatch.decode.incarnation == "second"


async def test_a_watch_that_broke_is_opened_again_while_the_worker_is_a_member(running: Running) -> None:
    worker = FakeWorker("m0", "mixed")
    async with running.living(FakeStore(), "store"), joined(worker, running.address("m0"), running.target):
        async with serving(worker, running.address("m0")):
            await running.ready()
        await running.state_when(lambda state: not state.ready)
        async with serving(worker, running.address("m0")):
            await running.ready()
    assert worker.num_watches >= 2


async def test_reports_change_what_is_placed_where(cluster: Running) -> None:
    busy = FakeWorker("d1", "decode")
    front_end = cluster.front_end()
    async with cluster.living(busy, "d1"):
        busy.say(running_sequences=8)
        await cluster.state_when(
            lambda state: any(each.report.running_sequences == 8 for each in state.workers if each.member.id == "d1")
        )
        chosen = [(await front_end.ask(arrived(f"r{i}"))).dispatch.decode.id for i in range(3)]
    assert chosen == ["d0"] * 3


async def test_a_missed_event_opens_a_new_watch_and_serving_goes_on(running: Running) -> None:
    store = FakeStore()
    async with running.living(store, "store"), running.living(FakeWorker("m0", "mixed"), "m0"):
        await running.ready()
        front_end = running.front_end()
        cold = await front_end.ask(arrived("r", 1024))
        store.held = keys(1024)
        store.say(5, *keys(32))

        async def probe() -> pb.Command | None:
            command = await front_end.ask(arrived("r", 1024, attempt=store.num_watches))
            assert command.HasField("dispatch")
            return command if command.dispatch.predicted_ttft_s < cold.dispatch.predicted_ttft_s / 2 else None

        await until(probe)
        assert store.num_watches == 2


async def test_what_a_real_store_node_holds_shortens_the_predicted_ttft(running: Running) -> None:
    store = StoreConfig(
        listen=running.address("store"),
        socket=running.folder / "store.sock",
        directory=running.target,
        dram_bytes=PAYLOAD_BYTES * 64,
    )
    node_task = asyncio.create_task(node.run(store))
    try:
        async with running.living(FakeWorker("m0", "mixed"), "m0"):
            await running.ready()
            front_end = running.front_end()
            cold = await front_end.ask(arrived("r", 1024))
            client = await connect_to(store.socket)
            group = client.group()
            acquired = await group.acquire(keys(1024), ROOT, 0.0)
            await group.commit([payloads.write(client, reservation) for reservation in acquired.reserved])

            async def probe() -> pb.Command | None:
                command = await front_end.ask(arrived("r", 1024))
                return command if command.dispatch.predicted_ttft_s < cold.dispatch.predicted_ttft_s / 2 else None

            await until(probe)
            status = (await running.state()).stores[0].status
            assert (status.committed_blocks, status.leased_blocks, status.orphaned_blocks) == (32, 32, 0)
            await client.close()
    finally:
        node_task.cancel()
        await asyncio.wait([node_task])


async def test_a_full_cluster_rejects_until_a_front_end_and_its_requests_are_gone(running: Running) -> None:
    async with running.living(FakeStore(), "store"), running.living(FakeWorker("m0", "mixed", max_sequences=1), "m0"):
        await running.ready()
        first, second = running.front_end(), running.front_end()
        assert (await first.ask(arrived("r"))).HasField("dispatch")
        rejected = (await second.ask(arrived("s"))).reject
        assert rejected.reason == pb.Reject.OVERLOAD
        assert rejected.retry_after_s >= 1.0
        first.leave()

        async def probe() -> pb.Command | None:
            command = await second.ask(arrived("s"))
            return command if command.HasField("dispatch") else None

        await until(probe)


async def test_a_front_end_that_ends_its_stream_is_let_go(cluster: Running) -> None:
    front_end = cluster.front_end()
    await front_end.ask(arrived("r"))
    await front_end.end()


@pytest.mark.parametrize(
    ("event", "field"),
    [
        (pb.ServerEvent(arrived=pb.RequestArrived(num_tokens=1)), "ref.request_id"),
        (pb.ServerEvent(ref=ref_to_pb(Ref("r"))), "event"),
        (pb.ServerEvent(ref=ref_to_pb(Ref("r")), arrived=pb.RequestArrived()), "num_tokens"),
        (
            pb.ServerEvent(ref=ref_to_pb(Ref("r")), arrived=pb.RequestArrived(num_tokens=1, block_keys=[b"short"])),
            "block key",
        ),
        (
            pb.ServerEvent(ref=ref_to_pb(Ref("r")), prefill_done=pb.PrefillDone(ttft_s=float("nan"))),
            "ttft_s",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_an_invalid_event_ends_its_stream_alone(cluster: Running, event: pb.ServerEvent, field: str) -> None:
    good, bad = cluster.front_end(), cluster.front_end()
    await good.ask(arrived("r"))
    await bad.say(event)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await bad.hear()
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (raised.value.details() or "").startswith(field)
    assert (await good.ask(arrived("s"))).HasField("dispatch")


async def test_a_worker_with_another_model_is_logged_and_left_out(
    cluster: Running, caplog: pytest.LogCaptureFixture
) -> None:
    odd = FakeWorker("odd", "decode", card=replace(CARD, weights_digest="another"))
    with caplog.at_level(logging.ERROR, "perigee.scheduler"):
        async with cluster.living(odd, "odd"):
            await cluster.state_when(lambda state: any(each.report.worker_id == "odd" for each in state.workers))
            odd.say(running_sequences=1)
            await cluster.state_when(lambda state: any(each.report.running_sequences == 1 for each in state.workers))
            front_end = cluster.front_end()
            chosen = [(await front_end.ask(arrived(f"r{i}"))).dispatch.decode.id for i in range(3)]
    assert chosen == ["d0"] * 3
    assert [record.getMessage() for record in caplog.records if "worker=odd" in record.getMessage()] == [
        "worker excluded worker=odd its model card differs from the cluster's"
    ]


async def test_a_stopped_conductor_leaves_no_socket(tmp_path: Path) -> None:
    async with conductor(tmp_path) as running:
        await running.state()
        assert (tmp_path / "conductor").exists()
    assert not (tmp_path / "conductor").exists()


async def test_an_address_that_cannot_be_listened_on_is_named(tmp_path: Path) -> None:
    with pytest.raises(SchedulerError, match="listen: cannot listen on"):
        await service.run(ConductorConfig(listen=f"unix:{tmp_path}/missing/socket"))
