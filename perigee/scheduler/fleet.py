"""The numbers of all workers in columns, a row for each worker, so that a policy can weigh them all at once."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from perigee.scheduler.cost import CostProfile
from perigee.scheduler.prompt_queue import RankedWork
from perigee.scheduler.worker_view import Demand, WorkerView

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]

_FIRST_SIZE = 16


class Fleet:
    """Holds a row for each worker from `add` to `remove`, and copies of the worker's numbers as of the last `refresh`.

    The methods predict for all rows; what they say of rows that no worker has is without meaning.
    """

    sequences: Floats
    context_tokens: Floats
    room: Floats  # pages that one more sequence could have
    next_step_s: Floats  # with one more sequence that has no context
    step_factor: Floats
    total_pages: Floats
    prefill_factor: Floats
    prefill_offset_s: Floats
    load_factor: Floats
    foreign_s: Floats  # of prompts
    last_chosen: Floats

    def __init__(self, profile: CostProfile) -> None:
        self.work = RankedWork()
        self.workers: list[WorkerView | None] = []
        self._profile = profile
        self._free: list[int] = []
        self._table: Floats = np.zeros((len(Fleet.__annotations__), 0))
        # Of the workers' store nodes: their numbers in the index of prefixes, who is at each to prefill and to decode,
        # and how many blocks they can hold.
        self.node_numbers: Rows = np.zeros(0, np.intp)
        self.prefillers_at: dict[int, list[int]] = {}
        self.decoders_at: dict[int, list[int]] = {}
        self.store_slots: Floats = np.zeros(0)
        self._resize(_FIRST_SIZE)

    def take_row(self) -> int:
        """A row that is free."""
        if not self._free:
            self._resize(2 * len(self.workers))
        return self._free.pop()

    def enter(self, worker: WorkerView) -> None:
        """Fills the worker's row, which it took before."""
        self.workers[worker.row] = worker
        self.refresh(worker)

    def remove(self, worker: WorkerView) -> None:
        self.workers[worker.row] = None
        self._free.append(worker.row)

    def unseat(self) -> None:
        """Forgets which worker is at which store node."""
        self.node_numbers[:] = -1
        self.prefillers_at.clear()
        self.decoders_at.clear()

    def seat(self, worker: WorkerView, node_number: int, store_slots: int) -> None:
        """Tells about the store node of a worker that has reported. An unknown number of slots is 0."""
        assert worker.report is not None
        self.node_numbers[worker.row] = node_number
        if worker.report.role != "decode":
            self.prefillers_at.setdefault(node_number, []).append(worker.row)
        if worker.report.role != "prefill":
            self.decoders_at.setdefault(node_number, []).append(worker.row)
        self.store_slots[worker.row] = store_slots or np.inf

    def refresh(self, worker: WorkerView) -> None:
        """Copies all that may have changed of a worker."""
        self.refresh_queue(worker)
        self.refresh_load(worker)
        self.total_pages[worker.row] = worker.report.total_pages if worker.report is not None else 0

    def refresh_queue(self, worker: WorkerView) -> None:
        """Copies what a change of the worker's prompts changes, and what was learned from one."""
        row, queue, cost = worker.row, worker.queue, worker.cost
        self.load_factor[row] = cost.load.factor
        self.prefill_factor[row] = cost.prefill.factor
        self.prefill_offset_s[row] = cost.prefill.offset_s
        self.foreign_s[row] = queue.foreign_s
        self.last_chosen[row] = worker.last_chosen

    def refresh_load(self, worker: WorkerView) -> None:
        """Copies what a change of the worker's sequences changes."""
        row, placed, foreign = worker.row, worker.placed, worker.foreign
        sequences = placed.sequences + foreign.sequences
        context_tokens = placed.context_tokens + foreign.context_tokens
        self.sequences[row] = sequences
        self.context_tokens[row] = context_tokens
        self.room[row] = worker.room
        self.next_step_s[row] = worker.cost.step_s(sequences + 1, context_tokens)
        self.step_factor[row] = worker.cost.step.factor
        self.last_chosen[row] = worker.last_chosen

    # ---- predictions, one for each row

    def queue_s(self, rank: float, now: float) -> Floats:
        """How long a prompt of this rank would wait for those before it."""
        return self.work.until(rank, len(self.workers), now) + self.foreign_s

    def step_s(self, demand: Demand) -> Floats:
        """The TBT with one more sequence in the batch."""
        return self.next_step_s + self.step_factor * self._profile.context_s(demand.num_tokens)

    # ---- rows

    def views(self, rows: Rows) -> tuple[WorkerView, ...]:
        """The workers of these rows."""
        return tuple(self.worker(row) for row in rows)

    def worker(self, row: int | np.intp) -> WorkerView:
        worker = self.workers[row]
        assert worker is not None, "nobody has this row"
        return worker

    def _resize(self, size: int) -> None:
        before = len(self.workers)
        self.workers += [None] * (size - before)
        self._free += range(size - 1, before - 1, -1)
        self._table = _widened(self._table, size)
        self.node_numbers = np.concatenate([self.node_numbers, np.full(size - before, -1)])
        self.store_slots = np.concatenate([self.store_slots, np.zeros(size - before)])
        for name, column in zip(Fleet.__annotations__, self._table, strict=True):
            setattr(self, name, column)


def _widened(table: Floats, size: int) -> Floats:
    wide = np.zeros((len(table), size))
    wide[:, : table.shape[1]] = table
    return wide


def rows_of(workers: Iterable[WorkerView]) -> Rows:
    """Their rows, in order of their ids, which is how ties between them are broken."""
    return np.array([worker.row for worker in sorted(workers, key=lambda worker: worker.id)], np.intp)
