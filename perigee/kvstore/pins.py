"""Blocks that tenants keep in the arena for a while, each tenant up to a quota."""

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.errors import InvalidRequest, QuotaExceeded
from perigee.kvstore.holdings import NODE, GroupId
from perigee.kvstore.index import BlockIndex


@dataclass(frozen=True, slots=True)
class PinLimits:
    """How many blocks one tenant may pin, and all of them together, and for how long at a time."""

    tenant_blocks: int
    total_blocks: int
    max_ttl_s: float


@dataclass(slots=True)
class _Tenant:
    pins: dict[BlockKey, tuple[float, GroupId]] = field(default_factory=dict)  # when it ends, and who holds it


class Pins:
    """Each pin is a lease that the node holds on a tenant's behalf; time or `unpin` ends it."""

    def __init__(self, index: BlockIndex, limits: PinLimits) -> None:
        self._index = index
        self._limits = limits
        self._tenants: dict[str, _Tenant] = {}
        self._numbers = itertools.count(-1, -1)  # the node's other groups count up
        self._ends: list[tuple[float, str, BlockKey]] = []

    def __len__(self) -> int:
        return sum(len(tenant.pins) for tenant in self._tenants.values())

    def pin(self, tenant_id: str, keys: Sequence[BlockKey], ttl_s: float, now: float) -> list[bool]:
        """Pins those of `keys` that are in the arena, or pins them anew until `ttl_s` from now; says which.

        Raises QuotaExceeded, with nothing changed, if those are too many, InvalidRequest for a time that is too long.
        """
        if not 0 < ttl_s <= self._limits.max_ttl_s:
            raise InvalidRequest(f"ttl: {ttl_s} s; allowed is anything above 0 up to {self._limits.max_ttl_s} s")
        present = self._index.lookup(keys)
        here = [key for key, is_here in zip(keys, present, strict=True) if is_here]
        self._check_quota(tenant_id, here)
        tenant = self._tenants.setdefault(tenant_id, _Tenant())
        for key in here:
            self._keep(tenant, key, now + ttl_s, now)
            heapq.heappush(self._ends, (now + ttl_s, tenant_id, key))
        return present

    def unpin(self, tenant_id: str, keys: Iterable[BlockKey]) -> None:
        """Ends the tenant's pins on `keys`. No effect on what it did not pin."""
        tenant = self._tenants.get(tenant_id, _Tenant())
        for key in keys:
            _, group = tenant.pins.pop(key, (0.0, None))
            if group:
                self._index.release(group)
        if not tenant.pins:
            self._tenants.pop(tenant_id, None)

    def next_end(self) -> float | None:
        """When `expire` has something to do."""
        while self._ends and self._is_outdated(*self._ends[0]):
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else None

    def expire(self, now: float) -> bool:
        """Ends the pins whose time is over. Whether there were any."""
        ended = False
        while (end := self.next_end()) is not None and end <= now:
            _, tenant_id, key = heapq.heappop(self._ends)
            self.unpin(tenant_id, [key])
            ended = True
        return ended

    def _keep(self, tenant: _Tenant, key: BlockKey, until: float, now: float) -> None:
        _, group = tenant.pins.get(key, (0.0, None))
        if group is None:
            group = GroupId(NODE, next(self._numbers))
            self._index.lease(group, [(0, key)], now)
        tenant.pins[key] = until, group

    def _check_quota(self, tenant_id: str, keys: Sequence[BlockKey]) -> None:
        held = self._tenants.get(tenant_id, _Tenant()).pins
        new = sum(1 for key in keys if key not in held)
        if len(held) + new > self._limits.tenant_blocks:
            raise QuotaExceeded(
                f"{len(held) + new} blocks pinned by {tenant_id!r}; allowed are {self._limits.tenant_blocks}"
            )
        if len(self) + new > self._limits.total_blocks:
            raise QuotaExceeded(f"{len(self) + new} blocks pinned by all; allowed are {self._limits.total_blocks}")

    def _is_outdated(self, end: float, tenant_id: str, key: BlockKey) -> bool:
        """Whether the pin has ended already, or ends later by now."""
        tenant = self._tenants.get(tenant_id)
        return tenant is None or tenant.pins.get(key, (None, None))[0] != end
