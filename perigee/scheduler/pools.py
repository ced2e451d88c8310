"""Sets of workers that a policy may choose from."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from perigee.scheduler.ids import NodeId, WorkerId
from perigee.scheduler.worker_view import Demand, WorkerView


@dataclass(frozen=True, slots=True)
class Pools:
    """Workers by what they may be given. A mixed worker does both phases of a request, and never only one of them.

    The phases may be on different store nodes: blocks are pulled from one to the other.
    """

    prefill: tuple[WorkerView, ...] = ()
    decode: tuple[WorkerView, ...] = ()
    mixed: tuple[WorkerView, ...] = ()

    @classmethod
    def of(cls, workers: Iterable[WorkerView]) -> "Pools":
        roles: dict[str, list[WorkerView]] = {"prefill": [], "decode": [], "mixed": []}
        for worker in workers:
            if worker.report is not None:
                roles[worker.report.role].append(worker)
        return cls(tuple(roles["prefill"]), tuple(roles["decode"]), tuple(roles["mixed"]))

    @property
    def can_serve(self) -> bool:
        """Whether both phases find a worker."""
        return bool(self.mixed or (self.prefill and self.decode))

    @property
    def prefillers(self) -> tuple[WorkerView, ...]:
        """Everyone who could prefill a request whose decode also finds a worker."""
        return self.mixed + (self.prefill if self.decode else ())

    @property
    def decoders(self) -> tuple[WorkerView, ...]:
        """Everyone who could decode a request whose prefill also finds a worker."""
        return self.mixed + (self.decode if self.prefill else ())

    def decoders_after(self, prefiller: WorkerView) -> tuple[WorkerView, ...]:
        """Who may decode what one of `prefillers` prefilled; at least one."""
        if any(worker is prefiller for worker in self.mixed):
            return (prefiller,)
        return self.decode

    def holding(self, demand: Demand) -> "Pools":
        """Those large enough for the demand, were they idle."""
        return Pools(
            tuple(worker for worker in self.prefill if worker.could_prefill(demand)),
            tuple(worker for worker in self.decode if worker.could_decode(demand)),
            tuple(worker for worker in self.mixed if worker.could_decode(demand)),
        )

    def with_room(self, demand: Demand) -> "Pools":
        """Those that can take the demand now. A prompt waits its turn, so prefill workers always have room."""
        return Pools(
            self.prefill,
            tuple(worker for worker in self.decode if worker.has_room(demand)),
            tuple(worker for worker in self.mixed if worker.has_room(demand)),
        )

    def preferring_room(self, demand: Demand) -> "Pools":
        """Those that can take the demand now, or all if nobody can."""
        with_room = self.with_room(demand)
        return with_room if with_room.can_serve else self

    def at(self, nodes: Collection[NodeId]) -> "Pools":
        """Those whose store node is one of these."""
        return self._only(lambda worker: worker.store in nodes)

    def without(self, worker_id: WorkerId) -> "Pools":
        return self._only(lambda worker: worker.id != worker_id)

    def _only(self, condition: Callable[[WorkerView], bool]) -> "Pools":
        return Pools(
            tuple(filter(condition, self.prefill)),
            tuple(filter(condition, self.decode)),
            tuple(filter(condition, self.mixed)),
        )
