"""What store nodes were asked to pull from each other, so that not everyone asks the same one at once."""

import numpy as np
from numpy.typing import NDArray

_NEVER = -np.inf


class Transfers:
    """When each store node, by its number, will have sent and received all that it was asked to, one after another."""

    def __init__(self) -> None:
        self._sent_at: dict[int, float] = {}
        self._received_at: NDArray[np.float64] = np.full(16, _NEVER)  # the last is for all higher numbers

    def send_wait_s(self, node: int, now: float) -> float:
        """How long a node still sends."""
        return max(0.0, self._sent_at.get(node, now) - now)

    def wait_s(self, source: int, target: int, now: float) -> float:
        """How long a transfer between two nodes would wait for others."""
        return max(self.send_wait_s(source, now), self._received_at.item(min(target, self._last)) - now)

    def receive_wait_s(self, nodes: NDArray[np.intp], now: float) -> NDArray[np.float64]:
        """How long each of these nodes still receives; below 0 if it has nothing to receive."""
        wait_s: NDArray[np.float64] = self._received_at.take(nodes, mode="clip") - now
        return wait_s

    def book(self, source: int, target: int, seconds: float, now: float) -> None:
        """A transfer was ordered. It begins when both sides are done with those before it."""
        if target >= self._last:
            more = np.full(max(target, self._last), _NEVER)
            self._received_at = np.concatenate([self._received_at, more])
        begins_at = max(now, self._sent_at.get(source, now), self._received_at.item(target))
        self._sent_at[source] = self._received_at[target] = begins_at + seconds

    def forget(self, node: int) -> None:
        """The number will be another node's."""
        self._sent_at.pop(node, None)
        self._received_at[min(node, self._last)] = _NEVER

    @property
    def _last(self) -> int:
        return len(self._received_at) - 1
