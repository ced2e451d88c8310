"""Who goes first, and who has had more than a fair share.

Prompts that wait are ordered by start-time fair queueing (Goyal, Vin and Cheng, 1996) over tenants: each prompt starts,
in virtual time, when its tenant's last one ended, but not before the present; and takes the longer, the more work it is
and the less its tenant weighs. The present is when the prompt started that was computed last. So a tenant that asks for
more than its share drifts into the future, and is passed by others; one that asked for nothing earns nothing by that.
"""

import math
from collections.abc import Iterable, Mapping

from perigee.scheduler.events import RequestArrived

# How much earlier, in virtual seconds, each level of priority counts as having come. As virtual time goes on whoever is
# served, nothing waits for ever.
PRIORITY_BOOST_S = 10.0

# A tenant that was turned away within so many seconds has a claim to its share.
_WANTS_FOR_S = 30.0
_MAX_TENANTS = 4096


def parse_weights(parts: Iterable[str]) -> dict[str, float]:
    """`NAME=WEIGHT` each, tenants' names and numbers above 0. Raises ValueError for anything else."""
    weights: dict[str, float] = {}
    for part in parts:
        name, _, text = (each.strip() for each in part.rpartition("="))
        if not name or not _is_weight(text):
            raise ValueError(f"{part!r}: allowed is NAME=WEIGHT, a tenant's name and a finite number above 0")
        if name in weights:
            raise ValueError(f"{part!r}: {name!r} has a weight already, allowed is one for each tenant")
        weights[name] = float(text)
    return weights


def _is_weight(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


class Ranks:
    """Virtual arrival times in seconds. While nothing waits they are those of the Conductor's clock.

    `weights` are of tenants that count for more or less than 1.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._present = 0.0
        self._ends: dict[str, float] = {}  # virtual end of each tenant's last prompt, where that is not past

    def preview(self, request: RequestArrived) -> float:
        """The rank that the request would have, were it dispatched now: smaller goes first."""
        return self._start(request.tenant) - request.age_s - PRIORITY_BOOST_S * request.priority

    def rank(self, request: RequestArrived, work_s: float, num_workers: int) -> float:
        """Takes in that it is dispatched. `work_s` is what its prompt is predicted to take one of `num_workers`."""
        rank = self.preview(request)
        weight = self._weights.get(request.tenant, 1.0)
        self._ends[request.tenant] = self._start(request.tenant) + work_s / (weight * max(1, num_workers))
        if len(self._ends) > _MAX_TENANTS:
            self._forget()
        return rank

    def served(self, rank: float, priority: int) -> None:
        """The prompt of this rank has been computed."""
        self._present = max(self._present, rank + PRIORITY_BOOST_S * priority)

    def idle(self, now: float) -> None:
        """No prompt waits: all that was is past."""
        self._present = now
        self._ends.clear()

    def _start(self, tenant: str) -> float:
        return max(self._present, self._ends.get(tenant, self._present))

    def _forget(self) -> None:
        """Drops the tenants whose last prompt is past, and of the others the one that is nearest to it."""
        self._ends = {tenant: end for tenant, end in self._ends.items() if end > self._present}
        if len(self._ends) > _MAX_TENANTS:
            del self._ends[min(self._ends, key=lambda tenant: (self._ends[tenant], tenant))]


class Shares:
    """What each tenant holds of the decode workers, against what would be fair among those that hold or want some."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._pages: dict[str, int] = {}
        self._held = 0  # pages of all
        self._refused_at: dict[str, float] = {}  # the one that was refused last is last
        self._weight = 0.0  # of the tenants in either

    def take(self, tenant: str, pages: int) -> None:
        """A request was dispatched, and has booked these pages."""
        self._join(tenant)
        self._pages[tenant] = self._pages.get(tenant, 0) + pages
        self._held += pages

    def give_back(self, tenant: str, pages: int) -> None:
        """It is off the books."""
        self._pages[tenant] -= pages
        self._held -= pages
        if not self._pages[tenant]:
            del self._pages[tenant]
            self._leave(tenant)

    def refused(self, tenant: str, now: float) -> None:
        """A request was turned away for want of room."""
        self._forget(now)
        self._join(tenant)
        self._refused_at.pop(tenant, None)
        self._refused_at[tenant] = now

    def is_above(self, tenant: str, now: float) -> bool:
        """Whether the tenant holds more than its fair share while another one was turned away lately."""
        self._forget(now)
        num_others = len(self._refused_at) - (tenant in self._refused_at)
        if not num_others:
            return False
        return self._pages.get(tenant, 0) * self._weight > self._held * self._weight_of(tenant)

    def _forget(self, now: float) -> None:
        """Drops old refusals."""
        while self._refused_at:
            tenant, at = next(iter(self._refused_at.items()))
            if now - at <= _WANTS_FOR_S and len(self._refused_at) <= _MAX_TENANTS:
                return
            del self._refused_at[tenant]
            self._leave(tenant)

    def _join(self, tenant: str) -> None:
        if tenant not in self._pages and tenant not in self._refused_at:
            self._weight += self._weight_of(tenant)

    def _leave(self, tenant: str) -> None:
        if tenant not in self._pages and tenant not in self._refused_at:
            self._weight -= self._weight_of(tenant)

    def _weight_of(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)
