"""The live executor: what happens in the cluster becomes events, and the Conductor's commands are carried out."""

import asyncio
import logging

from perigee.kvstore.access import OPEN, Access
from perigee.kvstore.directory import Directory, Member
from perigee.kvstore.store_pb2 import StoreStatus
from perigee.scheduler.commands import (
    Command,
    Dispatch,
    Drain,
    Exclude,
    Proceed,
    Reject,
    Replicate,
    Resync,
    ServerCommand,
    SetRole,
    Trim,
)
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.events import Event, ServerLost, Tick
from perigee.scheduler.ids import ServerId
from perigee.scheduler.mover import Mover
from perigee.scheduler.recording.journal import Journal
from perigee.scheduler.watches import StoreWatch, WorkerWatch

_log = logging.getLogger(__name__)

Outbox = asyncio.Queue[ServerCommand | None]  # None: nothing more will come


class Driver:
    """Owns the Conductor. Everything here happens on one event loop, so events have one order."""

    def __init__(
        self, conductor: Conductor, directory: Directory, tick_s: float, journal: Journal, access: Access = OPEN
    ) -> None:
        self.conductor = conductor
        self.journal = journal
        self._directory = directory
        self._tick_s = tick_s
        self._access = access
        self._watches: dict[str, tuple[WorkerWatch | StoreWatch, asyncio.Task[None]]] = {}  # by member's id
        self._outboxes: dict[ServerId, Outbox] = {}
        self._mover = Mover(access)
        self._num_attached = 0

    @property
    def now(self) -> float:
        """The Conductor's clock."""
        return asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Follows the cluster until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._tick())
                async for members in self._directory.watch():
                    self._follow(tasks, members)
        finally:
            await self._mover.close()

    def emit(self, event: Event) -> None:
        """Tells the Conductor, and does what it says."""
        now = self.now
        commands = self.conductor.handle(event, now)
        self.journal.note(event, now, commands)
        for command in commands:
            self._execute(command)
        self.journal.log(self.conductor.receipts.take_ended())

    def attach(self) -> tuple[ServerId, Outbox]:
        """A new server's id, and the queue that its commands will be in."""
        self._num_attached += 1
        server = ServerId(f"server-{self._num_attached}")
        self._outboxes[server] = asyncio.Queue()
        _log.info("server attached server=%s", server)
        return server, self._outboxes[server]

    def detach(self, server: ServerId) -> None:
        """The server is gone, and its requests with it."""
        del self._outboxes[server]
        _log.info("server detached server=%s", server)
        self.emit(ServerLost(server))

    async def store_statuses(self) -> dict[str, StoreStatus]:
        """What each store node says of itself now, without those that do not answer."""
        watches = [watch for watch, _ in self._watches.values() if isinstance(watch, StoreWatch)]
        statuses = await asyncio.gather(*(watch.status() for watch in watches))
        return {watch.member.id: status for watch, status in zip(watches, statuses, strict=True) if status is not None}

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            self.emit(Tick())

    def _follow(self, tasks: asyncio.TaskGroup, members: tuple[Member, ...]) -> None:
        """Watches exactly these members. One that changed in any way is a new one."""
        current = {member.id: member for member in members}
        for member_id, (watch, task) in list(self._watches.items()):
            if current.get(member_id) != watch.member:
                task.cancel()
                del self._watches[member_id]
        for member in members:
            if member.id not in self._watches:
                kind = WorkerWatch if member.kind == "worker" else StoreWatch
                watch = kind(member, self.emit, self._access)
                self._watches[member.id] = watch, tasks.create_task(watch.run(), name=f"watch-{member.id}")

    def _execute(self, command: Command) -> None:
        match command:
            case Resync():
                self._resync(command)
            case Exclude():
                _log.error("worker excluded worker=%s %s", command.worker_id, command.reason)
            case Drain():
                state = "on" if command.draining else "off"
                _log.info("drain %s worker=%s reason=%s", state, command.worker_id, command.reason)
            case Replicate() | Trim():
                self._mover.start(command, self._member(command.node_id))
            case SetRole():
                self._mover.start(command, self._member(command.worker_id))
            case Dispatch() | Proceed() | Reject():
                _log_command(command)
                if outbox := self._outboxes.get(command.server):
                    outbox.put_nowait(command)

    def _member(self, member_id: str) -> Member | None:
        entry = self._watches.get(member_id)
        return entry[0].member if entry else None

    def _resync(self, command: Resync) -> None:
        _log.warning("events missed store=%s", command.node_id)
        if entry := self._watches.get(command.node_id):
            entry[0].reopen()


def _log_command(command: ServerCommand) -> None:
    match command:
        case Dispatch():
            _log.info(
                "dispatch request=%s prefill=%s decode=%s predicted_ttft_s=%.4f predicted_tbt_s=%.4f",
                command.ref,
                command.prefill.id,
                command.decode.id,
                command.predicted_ttft_s,
                command.predicted_tbt_s,
            )
        case Reject():
            _log.info(
                "reject request=%s reason=%s retry_after_s=%.1f message=%s",
                command.ref,
                command.reason.name,
                command.retry_after_s,
                command.message,
            )
        case Proceed():
            _log.debug("proceed request=%s", command.ref)
