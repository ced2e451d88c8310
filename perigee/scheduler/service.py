"""The Conductor's process: its gRPC service, with the directory of the cluster's members beside it."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import asdict

import grpc

from perigee.kvstore.directory import Directory, InMemoryDirectory, WatchedDirectory, member_to_pb
from perigee.kvstore.directory_pb2_grpc import add_DirectoryServicer_to_server
from perigee.scheduler import scheduler_pb2 as pb
from perigee.scheduler import scheduler_pb2_grpc as rpc
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.config import ConductorConfig
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.cost.profile_file import read_profile
from perigee.scheduler.driver import Driver, Outbox
from perigee.scheduler.errors import InvalidMessage, SchedulerError
from perigee.scheduler.ids import ServerId, WorkerId
from perigee.scheduler.policies import make_policies, parse_policies
from perigee.scheduler.recording.journal import Journal
from perigee.scheduler.shadow import Shadow
from perigee.scheduler.wire import command_to_pb, error_to_pb, event_from_pb, moves_to_pb, shadow_to_pb
from perigee.workers.wire import card_to_pb, report_to_pb

_log = logging.getLogger(__name__)

# A prompt's block keys travel in one message, 34 bytes each.
_OPTIONS = [("grpc.max_receive_message_length", 64 << 20)]


async def run(config: ConductorConfig) -> None:
    """Serves until cancelled. Raises SchedulerError if `config.listen` cannot be listened on, the profile not be read,
    or a file not be written.
    """
    profile = _profile(config)
    async with Journal.opened(config, profile) as journal:
        await _serve(config, _conductor(config, profile), journal)


async def _serve(config: ConductorConfig, conductor: Conductor, journal: Journal) -> None:
    server = config.access.server(_OPTIONS)
    directory = _directory(config, server)
    driver = Driver(conductor, directory, config.tick_s, journal, config.access)
    # Milliseconds, so that a Conductor that comes later has a larger epoch.
    rpc.add_ConductorServicer_to_server(ConductorService(driver, directory, time.time_ns() // 1_000_000), server)
    port = _listen(server, config.listen)
    await server.start()
    _log.info("conductor started listen=%s port=%d", config.listen, port)
    try:
        await driver.run()
    finally:
        await server.stop(grace=None)
        _log.info("conductor stopped listen=%s", config.listen)


def _directory(config: ConductorConfig, server: grpc.aio.Server) -> Directory:
    """The directory where `config` says that it is, or a new one, which `server` then serves."""
    if config.directory is not None:
        return WatchedDirectory(config.directory, config.access)
    directory = InMemoryDirectory()
    add_DirectoryServicer_to_server(directory, server)
    return directory


def _conductor(config: ConductorConfig, profile: CostProfile) -> Conductor:
    """Its policies and its shadow's are as configured, and each has its own."""
    shadow = Shadow(make_policies(**asdict(parse_policies(config.shadow)))) if config.shadow else None
    policies = make_policies(**asdict(config.policies), role_hold_s=config.role_hold_s)
    return Conductor(policies, profile, shadow, config.receipts, config.weights)


def _profile(config: ConductorConfig) -> CostProfile:
    """What predictions start from, before they are corrected by what workers do. Says in the log where it is from."""
    if config.profile is None:
        _log.warning("cost model method='guessed': no profile was given, so the first predictions may be far off")
        return CostProfile()
    read = read_profile(config.profile)
    _log.info("cost model %s path=%s", read.origin, config.profile)
    return read.profile


def _listen(server: grpc.aio.Server, listen: str) -> int:
    try:
        return server.add_insecure_port(listen)
    except RuntimeError as error:
        raise SchedulerError(f"listen: cannot listen on {listen!r}") from error


class ConductorService(rpc.ConductorServicer):
    """What front ends talk to."""

    def __init__(self, driver: Driver, directory: Directory, epoch: int) -> None:
        self._driver = driver
        self._directory = directory
        self._epoch = epoch

    async def Attach(
        self,
        request_iterator: AsyncIterator[pb.ServerEvent],
        context: "grpc.aio.ServicerContext[pb.ServerEvent, pb.Command]",
    ) -> AsyncIterator[pb.Command]:
        server, outbox = self._driver.attach()
        reader = asyncio.create_task(self._read(server, request_iterator, outbox))
        try:
            while (command := await outbox.get()) is not None:
                yield command_to_pb(command, self._epoch)
            await reader
        except InvalidMessage as error:
            _log.warning("server sent what is invalid server=%s %s", server, error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            reader.cancel()
            self._driver.detach(server)
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, server: ServerId, requests: AsyncIterator[pb.ServerEvent], outbox: Outbox) -> None:
        """Tells what the server says, until it ends the stream. Raises InvalidMessage."""
        try:
            async for message in requests:
                self._driver.emit(event_from_pb(server, message))
        finally:
            outbox.put_nowait(None)

    async def Cluster(
        self,
        request: pb.ClusterRequest,
        context: "grpc.aio.ServicerContext[pb.ClusterRequest, pb.ClusterState]",
    ) -> pb.ClusterState:
        statuses = await self._driver.store_statuses()
        view = self._driver.conductor.view
        state = pb.ClusterState(
            epoch=self._epoch,
            ready=view.ready(self._driver.now),
            ttft_error=error_to_pb(view.ttft_error.summary()),
            tbt_error=error_to_pb(view.tbt_error.summary()),
            moves=moves_to_pb(view.move_counts),
        )
        if view.card is not None:
            state.card.CopyFrom(card_to_pb(view.card))
        for member in self._directory.members:
            announced = member_to_pb(member)
            if member.kind == "store":
                state.stores.append(pb.StoreState(member=announced, status=statuses.get(member.id)))
            else:
                worker = view.workers.get(WorkerId(member.id))
                report = report_to_pb(worker.report) if worker and worker.report else None
                state.workers.append(pb.WorkerState(member=announced, report=report))
        if (shadow := self._driver.conductor.shadow) is not None:
            state.shadow.CopyFrom(shadow_to_pb(shadow))
        return state

    async def Receipts(
        self,
        request: pb.ReceiptsRequest,
        context: "grpc.aio.ServicerContext[pb.ReceiptsRequest, pb.ReceiptsReply]",
    ) -> pb.ReceiptsReply:
        receipts = self._driver.conductor.receipts
        theirs = [receipt for receipt in receipts.find(request.request_id) if receipt.tenant == request.tenant]
        return pb.ReceiptsReply(
            documents=[self._driver.journal.document(receipt) for receipt in theirs], limit=receipts.limit
        )
