"""Who may be given work, found out anew only when that has changed."""

import math
from collections.abc import Mapping

from perigee.scheduler.fleet import Fleet
from perigee.scheduler.ids import NodeId, WorkerId
from perigee.scheduler.pools import Pools
from perigee.scheduler.prefixes import PrefixIndex
from perigee.scheduler.store_view import StoreView
from perigee.scheduler.worker_view import WorkerView

# A worker reports four times a second. One that is silent for this long is stopped or cut off, and gets no more work.
STALE_AFTER_S = 5.0


class Roster:
    """The pools of the usable workers. Reads the ClusterView's books, which says what changed in them."""

    def __init__(
        self,
        fleet: Fleet,
        workers: Mapping[WorkerId, WorkerView],
        stores: Mapping[NodeId, StoreView],
        prefixes: PrefixIndex,
    ) -> None:
        self._fleet = fleet
        self._workers = workers
        self._stores = stores
        self._prefixes = prefixes
        self._pools: Pools | None = None
        self._until = 0.0  # nobody in the pools is stale before
        self._standings: dict[WorkerId, tuple[str, int]] = {}  # of those in the pools

    def pools(self, now: float) -> Pools:
        """The workers that may be given work."""
        if now > self._until:
            self._until = self._stale_at()
        if self._pools is None or now > self._until:
            self._pools = self._gather(now)
        return self._pools

    def changed(self) -> None:
        """Workers came or went, or store nodes."""
        self._pools = None

    def heard(self, worker: WorkerView, now: float) -> None:
        """A worker has reported. Most reports change nothing here."""
        if self._standings.get(worker.id) != self._standing(worker, now):
            self._pools = None

    def _gather(self, now: float) -> Pools:
        standings = {worker.id: self._standing(worker, now) for worker in self._workers.values()}
        self._standings = {worker: standing for worker, standing in standings.items() if standing is not None}
        usable = [self._workers[worker] for worker in self._standings]
        self._fleet.unseat()
        for worker in usable:
            self._fleet.seat(worker, self._prefixes.numbers[worker.store], self._stores[worker.store].num_slots)
        self._until = self._stale_at()
        return Pools.of(self._fleet, usable)

    def _stale_at(self) -> float:
        """When the first of those in the pools is stale, unless it reports before."""
        known = (self._workers[worker].reported_at for worker in self._standings if worker in self._workers)
        return min(known, default=math.inf) + STALE_AFTER_S

    def _standing(self, worker: WorkerView, now: float) -> tuple[str, int] | None:
        """What the pools depend on: role and size. None if it is to get no work."""
        report = worker.report
        is_usable = (
            report is not None
            and not report.draining
            and not worker.draining
            and not worker.excluded
            and (report.max_sequences > 0 or report.role == "prefill")
            and now - worker.reported_at <= STALE_AFTER_S
            and worker.store in self._stores
        )
        return (report.role, report.total_pages) if report is not None and is_usable else None
