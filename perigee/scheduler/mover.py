"""Carries out what the Conductor wants moved, each with one call to the store node or worker that is to do it.

Calls are limited in time and number, and none is repeated. What came of one the Conductor hears from the node's block
events or the worker's next report, like everything that it knows of them: if it still wants it then, it says so again.
"""

import asyncio
import logging

import grpc

from perigee.kvstore import store_pb2
from perigee.kvstore.access import OPEN, Access
from perigee.kvstore.directory import Member
from perigee.kvstore.store_pb2_grpc import StoreNodeStub
from perigee.scheduler.commands import Replicate, SetRole, Trim
from perigee.workers import worker_pb2
from perigee.workers.worker_pb2_grpc import WorkerStub

_log = logging.getLogger(__name__)

Move = Replicate | Trim | SetRole

# A connection that is shared with nobody, and so nobody's backoff either.
_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)
_MOST_AT_ONCE = 64
_REPLICATE_TIMEOUT_S = 30.0
_TIMEOUT_S = 5.0


class Mover:
    """The calls that are under way. All of it is for one event loop, which it never holds up."""

    def __init__(self, access: Access = OPEN) -> None:
        self._access = access
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, move: Move, member: Member | None) -> None:
        """Begins a move by `member`, which is None if it has left."""
        if member is None or (isinstance(move, SetRole) and move.incarnation != member.incarnation):
            _log.warning("move dropped %s error=it has left", _described(move))
        elif len(self._tasks) >= _MOST_AT_ONCE:
            _log.warning("move dropped %s error=%d are under way", _described(move), len(self._tasks))
        else:
            task = asyncio.create_task(self._carry_out(move, member), name=f"move {_described(move)}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    @property
    def num_under_way(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """Ends the calls that are under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry_out(self, move: Move, member: Member) -> None:
        try:
            async with self._access.channel(member.address, _OPTIONS) as channel:
                outcome = await _call(move, channel)
            _log.info("move done %s %s", _described(move), outcome)
        except grpc.aio.AioRpcError as error:
            _log.warning("move failed %s code=%s error=%s", _described(move), error.code().name, error.details())


async def _call(move: Move, channel: grpc.aio.Channel) -> str:
    """What came of it, for the log. Raises AioRpcError."""
    match move:
        case Replicate():
            replicate = store_pb2.ReplicateRequest(source=move.source, parent=move.parent, keys=move.keys)
            replicated = await StoreNodeStub(channel).Replicate(replicate, timeout=_REPLICATE_TIMEOUT_S)
            return f"pulled={replicated.pulled} missing={replicated.missing}"
        case Trim():
            trimmed = await StoreNodeStub(channel).Trim(store_pb2.TrimRequest(keys=move.keys), timeout=_TIMEOUT_S)
            return f"trimmed={trimmed.trimmed}"
        case SetRole():
            request = worker_pb2.SetRoleRequest(incarnation=move.incarnation, role=move.role)
            await WorkerStub(channel).SetRole(request, timeout=_TIMEOUT_S)
            return ""


def _described(move: Move) -> str:
    match move:
        case Replicate():
            return f"replicate store={move.node_id} source={move.source} blocks={len(move.keys)}"
        case Trim():
            return f"trim store={move.node_id} blocks={len(move.keys)}"
        case SetRole():
            return f"set_role worker={move.worker_id} role={move.role}"
