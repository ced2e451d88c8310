"""Sets of workers that a policy may choose from."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from perigee.scheduler.fleet import Fleet, Floats, Rows, rows_of
from perigee.scheduler.ids import WorkerId
from perigee.scheduler.worker_view import Demand, WorkerView

_NO_ROWS: Rows = np.zeros(0, np.intp)


@dataclass(frozen=True, slots=True)
class Pools:
    """Workers by what they may be given, as rows of the fleet in order of the workers' ids. A mixed worker does both
    phases of a request, and never only one of them.

    The phases may be on different store nodes: blocks are pulled from one to the other. The smallest of these workers
    has `least_pages`, their smallest store node `least_slots`: what needs no more finds all of them large enough.
    """

    fleet: Fleet
    prefill_rows: Rows
    decode_rows: Rows
    mixed_rows: Rows
    least_pages: float
    least_slots: float

    @classmethod
    def of(cls, fleet: Fleet, workers: Sequence[WorkerView]) -> "Pools":
        """All of `workers`, whose reports say what they are."""
        roles: dict[str, list[WorkerView]] = {"prefill": [], "decode": [], "mixed": []}
        for worker in workers:
            if worker.report is not None:
                roles[worker.report.role].append(worker)
        rows = [worker.row for worker in workers]
        return cls(
            fleet,
            rows_of(roles["prefill"]),
            rows_of(roles["decode"]),
            rows_of(roles["mixed"]),
            float(fleet.total_pages[rows].min(initial=np.inf)),
            float(fleet.store_slots[rows].min(initial=np.inf)),
        )

    @property
    def can_serve(self) -> bool:
        """Whether both phases find a worker."""
        return bool(self.mixed_rows.size or (self.prefill_rows.size and self.decode_rows.size))

    @property
    def prefiller_rows(self) -> Rows:
        """Of everyone who could prefill a request whose decode also finds a worker."""
        if not self.mixed_rows.size:
            return self.prefill_rows if self.decode_rows.size else _NO_ROWS
        return np.concatenate([self.mixed_rows, self.prefill_rows]) if self.decode_rows.size else self.mixed_rows

    @property
    def decoder_rows(self) -> Rows:
        """Of everyone who could decode a request whose prefill also finds a worker."""
        if not self.mixed_rows.size:
            return self.decode_rows if self.prefill_rows.size else _NO_ROWS
        return np.concatenate([self.mixed_rows, self.decode_rows]) if self.prefill_rows.size else self.mixed_rows

    def decoder_rows_after(self, prefiller: WorkerView) -> Rows:
        """Of who may decode what one of the prefillers prefilled; at least one."""
        is_mixed = prefiller.report is not None and prefiller.report.role == "mixed"
        return np.array([prefiller.row]) if is_mixed else self.decode_rows

    @property
    def prefill(self) -> tuple[WorkerView, ...]:
        return self.fleet.views(self.prefill_rows)

    @property
    def decode(self) -> tuple[WorkerView, ...]:
        return self.fleet.views(self.decode_rows)

    @property
    def mixed(self) -> tuple[WorkerView, ...]:
        return self.fleet.views(self.mixed_rows)

    @property
    def prefillers(self) -> tuple[WorkerView, ...]:
        return self.fleet.views(self.prefiller_rows)

    @property
    def decoders(self) -> tuple[WorkerView, ...]:
        return self.fleet.views(self.decoder_rows)

    def holding(self, demand: Demand) -> "Pools":
        """Those large enough for the demand, were they idle."""
        if demand.pages <= self.least_pages:
            return self
        pages = self.fleet.total_pages
        return self._only(prefill=pages >= demand.prompt_pages, decode=pages >= demand.pages)

    def storing(self, num_blocks: int) -> "Pools":
        """Those whose store node has slots for so many blocks, or has not said how many it has."""
        if num_blocks <= self.least_slots:
            return self
        has_slots = self.fleet.store_slots >= num_blocks
        return self._only(prefill=has_slots, decode=has_slots)

    def with_room(self, demand: Demand) -> "Pools":
        """Those that can take the demand now. A prompt waits its turn, so prefill workers always have room."""
        least = min(_least(self.fleet.room, self.decode_rows), _least(self.fleet.room, self.mixed_rows))
        if demand.pages <= least:
            return self
        has_room = self.fleet.room >= demand.pages
        return replace(
            self, decode_rows=_where(self.decode_rows, has_room), mixed_rows=_where(self.mixed_rows, has_room)
        )

    def preferring_room(self, demand: Demand) -> "Pools":
        """Those that can take the demand now, or all if nobody can."""
        with_room = self.with_room(demand)
        return with_room if with_room.can_serve else self

    def without(self, worker_ids: Collection[WorkerId]) -> "Pools":
        others = np.array([worker is None or worker.id not in worker_ids for worker in self.fleet.workers])
        return self._only(prefill=others, decode=others)

    def _only(self, prefill: NDArray[np.bool_], decode: NDArray[np.bool_]) -> "Pools":
        return replace(
            self,
            prefill_rows=_where(self.prefill_rows, prefill),
            decode_rows=_where(self.decode_rows, decode),
            mixed_rows=_where(self.mixed_rows, decode),
        )


def _least(column: Floats, rows: Rows) -> float:
    if not rows.size:
        return np.inf
    values = column[rows]
    return values.item(values.argmin())


def _where(rows: Rows, condition: NDArray[np.bool_]) -> Rows:
    return rows[condition[rows]]
