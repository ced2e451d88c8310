"""What moves while no request asks for it: copies of hot prefixes, and workers between the pools."""

from typing import Protocol

from perigee.scheduler.commands import Replicate, SetRole, Trim
from perigee.scheduler.view import ClusterView

Move = Replicate | Trim | SetRole


class Balance(Protocol):
    """Asked about every second."""

    def tick(self, view: ClusterView, now: float) -> list[Move]:
        """What is to be moved now."""
        ...


class Still:
    """Moves nothing."""

    def tick(self, view: ClusterView, now: float) -> list[Move]:
        return []
