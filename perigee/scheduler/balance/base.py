"""The interface of balance policies: what moves while no request asks for it."""

from typing import Protocol

from perigee.scheduler.commands import Drain, Replicate, SetRole, Trim
from perigee.scheduler.view import ClusterView

Move = Drain | Replicate | Trim | SetRole


class Balance(Protocol):
    """Asked about every second. The Conductor enters what it says in the view, and passes it on."""

    @property
    def makes_copies(self) -> bool:
        """Whether it asks the view for hot prefixes and for copies, which are not noted otherwise."""
        ...

    def tick(self, view: ClusterView, now: float) -> list[Move]:
        """What is to be moved now."""
        ...


class Still:
    """Moves nothing."""

    makes_copies = False

    def tick(self, view: ClusterView, now: float) -> list[Move]:
        return []


class Several:
    """What each of some policies says, in their order."""

    def __init__(self, *policies: Balance) -> None:
        self._policies = policies
        self.makes_copies = any(policy.makes_copies for policy in policies)

    def tick(self, view: ClusterView, now: float) -> list[Move]:
        return [move for policy in self._policies for move in policy.tick(view, now)]
