"""Between the Conductor and the simulated cluster: reports and events in, commands out."""

from functools import partial

from perigee.kvstore.holdings import GroupId
from perigee.kvstore.messages import Fetched
from perigee.kvstore.waiting import Result
from perigee.replay.simulator.clock import Clock
from perigee.replay.simulator.node import Node
from perigee.replay.simulator.worker import INCARNATION, ROLES, Worker
from perigee.scheduler.commands import Command, Dispatch, Proceed, Reject, Replicate, ServerCommand, SetRole, Trim
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.events import BlockEvents, Event, Tick, WorkerJoined
from perigee.scheduler.ids import NodeId, WorkerId
from perigee.workers.messages import ModelCard

TICK_S = 1.0

# A worker says that it is there at least this often; the Conductor takes one for stopped that is silent for seconds.
HEARTBEAT_S = 2.0

# How long events of a node's blocks gather before they are told.
_FEED_S = 0.01


class Control:
    """Owns the Conductor. A worker's changes are reported at once, but not more often than every `report_s`."""

    def __init__(self, clock: Clock, conductor: Conductor, card: ModelCard, report_s: float) -> None:
        self.conductor = conductor
        self.workers: dict[str, Worker] = {}
        self.nodes: dict[str, Node] = {}
        self._clock = clock
        self._card = card
        self._report_s = report_s
        self._reported_at: dict[str, float] = {}
        self._due: set[str] = set()  # workers with a report on its way
        self._next_seq: dict[str, int] = {}
        self._gathering: set[str] = set()  # nodes
        self._is_over = False

    def open(self) -> None:
        """Makes workers and nodes known."""
        for node in self.nodes.values():
            self._next_seq[node.name] = 0
            self._tell_blocks(node, snapshot=True)
        for worker in self.workers.values():
            self.tell(WorkerJoined(WorkerId(worker.name), INCARNATION, "", NodeId(worker.node.name)))
            self._report(worker)
            self._clock.at(HEARTBEAT_S, self._beat, worker)
        self._clock.at(TICK_S, self._tick)

    def close(self) -> None:
        """Nothing is repeated any more."""
        self._is_over = True

    def tell(self, event: Event) -> list[ServerCommand]:
        """Lets the Conductor know, does what it says, and returns what it says to the front end."""
        said: list[ServerCommand] = []
        for command in self.conductor.handle(event, self._clock.now):
            match command:
                case Dispatch() | Proceed() | Reject():
                    said.append(command)
                case _:
                    self.execute(command)
        return said

    # ---- what the cluster calls ------------------------------------------------------------------------------------

    def worker_changed(self, worker: Worker) -> None:
        if worker.name not in self._due:
            self._due.add(worker.name)
            self._clock.at(self._reported_at.get(worker.name, 0.0) + self._report_s, self._report_due, worker)

    def blocks_changed(self, name: str) -> None:
        if name not in self._gathering:
            self._gathering.add(name)
            self._clock.at(self._clock.now + _FEED_S, self._tell_gathered, self.nodes[name])

    # ---- what comes by itself --------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if not self._is_over:
            self.tell(Tick())
            self._clock.at(self._clock.now + TICK_S, self._tick)

    def _beat(self, worker: Worker) -> None:
        if self._is_over:
            return
        if self._clock.now >= self._reported_at[worker.name] + HEARTBEAT_S:
            self._report(worker)
        self._clock.at(self._reported_at[worker.name] + HEARTBEAT_S, self._beat, worker)

    def _report_due(self, worker: Worker) -> None:
        self._due.discard(worker.name)
        self._report(worker)

    def _report(self, worker: Worker) -> None:
        self._reported_at[worker.name] = self._clock.now
        self.tell(worker.report(self._card))

    def _tell_gathered(self, node: Node) -> None:
        self._gathering.discard(node.name)
        self._tell_blocks(node, snapshot=False)

    def _tell_blocks(self, node: Node, *, snapshot: bool) -> None:
        events = tuple(node.store.take_events())
        if events or snapshot:
            first = self._next_seq[node.name]
            self._next_seq[node.name] += len(events)
            slots = node.store.index.num_slots
            self.tell(BlockEvents(NodeId(node.name), INCARNATION, first, events, snapshot, slots))

    # ---- commands --------------------------------------------------------------------------------------------------

    def execute(self, command: Command) -> None:
        match command:
            case SetRole():
                self.workers[command.worker_id].set_role(ROLES[command.role])
            case Replicate():
                self._replicate(command)
            case Trim():
                self.nodes[command.node_id].trim(command.keys)

    def _replicate(self, command: Replicate) -> None:
        node = self.nodes[command.node_id]
        group = node.group()
        received = partial(_replicated, node, group)
        node.fetch(group, command.keys, 0.0, command.source, command.parent, received)


def _replicated(node: Node, group: GroupId, result: Result) -> None:
    if not isinstance(result, Fetched) or result.done:
        node.release(group)
