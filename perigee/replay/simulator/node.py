"""A store node in virtual time: the real store, and what carries out its jobs."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from perigee.kvstore.blocks import NO_PARENT, BlockKey
from perigee.kvstore.holdings import GroupId
from perigee.kvstore.jobs import CancelPull, DropSegment, Job, Load, Pull, Spill
from perigee.kvstore.messages import CommittedBlock, Fetched, LeasedBlock
from perigee.kvstore.moves import PulledBlock
from perigee.kvstore.store import Store
from perigee.kvstore.waiting import Answer, Caller, Result
from perigee.replay.simulator.clock import Clock
from perigee.replay.simulator.disk import Disk
from perigee.replay.simulator.network import Network

Receive = Callable[[Result], None]

_CONNECTION = 1


class Node:
    """What a node's workers and its peers ask of it. Answers come through callbacks, at once or later.

    `changed` is called whenever there may be events to take from the store.
    """

    def __init__(
        self, name: str, clock: Clock, store: Store, network: Network, disk: Disk | None, changed: Callable[[], None]
    ) -> None:
        self.name = name
        self.store = store
        self.peers: dict[str, Node] = {}  # all nodes; the cluster fills it
        self._clock = clock
        self._network = network
        self._disk = disk
        self._changed = changed
        self._numbers = itertools.count(1)
        self._receivers: dict[int, Receive] = {}
        self._timer_at: float | None = None
        self._computed_since: float | None = None  # while a commit is told of: when the first layer of it was there
        self._pulls: dict[int, _Pulling] = {}

    # ---- for workers and peers -------------------------------------------------------------------------------------

    def group(self) -> GroupId:
        """A new group of leases and reservations."""
        return GroupId(_CONNECTION, next(self._numbers))

    def acquire(
        self, group: GroupId, keys: Sequence[BlockKey], parent: BlockKey, wait_s: float, receive: Receive
    ) -> None:
        """Leases the prefix that is here and reserves slots for the rest; one answer."""
        caller = self._caller(group, receive)
        self._finish(self.store.acquire(caller, keys, parent, wait_s, self._clock.now))

    def fetch(
        self,
        group: GroupId,
        keys: Sequence[BlockKey],
        wait_s: float,
        source: str,
        parent: BlockKey,
        receive: Receive,
    ) -> None:
        """Leases blocks as they come; answers until one is done."""
        caller = self._caller(group, receive)
        self._finish(self.store.fetch(caller, keys, wait_s, self._clock.now, source, parent))

    def commit(self, group: GroupId, blocks: Sequence[CommittedBlock], computed_since: float) -> None:
        """Makes blocks readable that were computed since then, one layer after the other."""
        self._computed_since = computed_since
        self._finish(self.store.commit(group, blocks, self._clock.now))
        self._computed_since = None

    def release(self, group: GroupId) -> None:
        """Ends all that the group has and waits for."""
        self._finish(self.store.release(group, self._clock.now))

    def trim(self, keys: Sequence[BlockKey]) -> None:
        """Drops blocks that nobody leases."""
        _, answers = self.store.trim(keys, self._clock.now)
        self._finish(answers)

    # ---- answers and jobs ------------------------------------------------------------------------------------------

    def _caller(self, group: GroupId, receive: Receive) -> Caller:
        number = next(self._numbers)
        self._receivers[number] = receive
        return Caller(group, number)

    def _finish(self, answers: Sequence[Answer]) -> None:
        """After anything that the store did."""
        for caller, result in _together(answers):
            receive = self._receivers[caller.request]
            if not isinstance(result, Fetched) or result.done:
                del self._receivers[caller.request]
            receive(result)
        for job in self.store.take_jobs():
            self._start(job)
        self._changed()
        self._set_timer()

    def _start(self, job: Job) -> None:
        match job:
            case Pull():
                self._pull(job)
            case CancelPull():
                pulling = self._pulls[job.job]
                pulling.source.release(pulling.group)  # which answers the pull
            case _:
                self._start_on_disk(job)

    def _set_timer(self) -> None:
        deadline = self.store.next_deadline()
        if deadline is not None and (self._timer_at is None or deadline < self._timer_at):
            self._timer_at = deadline
            self._clock.at(deadline, self._expire, deadline)

    def _expire(self, deadline: float) -> None:
        if deadline == self._timer_at:
            self._timer_at = None
            self._finish(self.store.expire(self._clock.now))

    # ---- pulls

    def _pull(self, job: Pull) -> None:
        source = self.peers[job.source]
        pulling = self._pulls[job.job] = _Pulling(job.job, source, source.group())
        keys = [expected.key for expected in job.expected]
        source.fetch(pulling.group, keys, job.wait_s, "", NO_PARENT, partial(self._sent, pulling))

    def _sent(self, pulling: "_Pulling", result: Result) -> None:
        """The source has some of the blocks, and sends them; or there will be no more."""
        now = self._clock.now
        blocks = result.blocks if isinstance(result, Fetched) else ()
        if blocks:
            since = pulling.source._computed_since
            tokens = len(blocks) * self.store.block_tokens
            arrival = self._network.send(pulling.source.name, self.name, tokens, now if since is None else since, now)
            pulling.arrives_at = max(pulling.arrives_at, arrival)
            self._clock.at(pulling.arrives_at, self._received, pulling, blocks)
        if not isinstance(result, Fetched) or result.done:
            self._clock.at(max(pulling.arrives_at, now + self._network.latency_s), self._pull_ended, pulling)

    def _received(self, pulling: "_Pulling", blocks: Sequence[LeasedBlock]) -> None:
        came = [PulledBlock(block.index, block.num_tokens, block.origin) for block in blocks]
        self._finish(self.store.pulled(pulling.job, came, self._clock.now))

    def _pull_ended(self, pulling: "_Pulling") -> None:
        del self._pulls[pulling.job]
        pulling.source.release(pulling.group)
        self._finish(self.store.pull_ended(pulling.job, False, self._clock.now))

    # ---- disk

    def _start_on_disk(self, job: Load | Spill | DropSegment) -> None:
        assert self._disk is not None
        match job:
            case Load():
                ended_at, record = self._disk.load(job)
                self._clock.at(ended_at, self._ended, partial(self.store.loaded, job.job, record))
            case Spill():
                ended_at, location = self._disk.spill(job)
                self._clock.at(ended_at, self._ended, partial(self.store.spilled, job.job, location))
            case DropSegment():
                self._disk.drop(job)
                self._clock.at(self._clock.now, self._ended, partial(self.store.dropped, job.segment))

    def _ended(self, tell: Callable[[float], list[Answer]]) -> None:
        self._finish(tell(self._clock.now))


@dataclass(slots=True)
class _Pulling:
    """A pull of this node, and what `source` leases for it. `arrives_at`: of the last blocks that were sent so far."""

    job: int
    source: Node
    group: GroupId
    arrives_at: float = 0.0


def _together(answers: Sequence[Answer]) -> list[Answer]:
    """What one caller gets at once, in one answer."""
    joined: list[Answer] = []
    for answer in answers:
        if joined and joined[-1].caller == answer.caller:
            first, last = joined[-1].result, answer.result
            assert isinstance(first, Fetched) and isinstance(last, Fetched)
            joined[-1] = Answer(answer.caller, Fetched(first.blocks + last.blocks, last.done, last.missing))
        else:
            joined.append(answer)
    return joined
