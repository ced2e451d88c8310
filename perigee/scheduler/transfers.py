"""What store nodes were asked to pull from each other, so that not everyone asks the same one at once."""


class Transfers:
    """When each store node, by its number, will have sent and received all that it was asked to, one after another.

    Only nodes that are busy are known here.
    """

    def __init__(self) -> None:
        self._sent_at: dict[int, float] = {}
        self._received_at: dict[int, float] = {}

    def send_wait_s(self, node: int, now: float) -> float:
        """How long a node still sends."""
        return max(0.0, self._sent_at.get(node, now) - now)

    def wait_s(self, source: int, target: int, now: float) -> float:
        """How long a transfer between two nodes would wait for others."""
        return max(0.0, self._sent_at.get(source, now) - now, self._received_at.get(target, now) - now)

    def receiving(self, now: float) -> dict[int, float]:
        """How long each node that receives still does."""
        for node in [node for node, at in self._received_at.items() if at <= now]:
            del self._received_at[node]
        return {node: at - now for node, at in self._received_at.items()}

    def book(self, source: int, target: int, seconds: float, now: float) -> None:
        """A transfer was ordered. It begins when both sides are done with those before it."""
        begins_at = max(now, self._sent_at.get(source, now), self._received_at.get(target, now))
        self._sent_at[source] = self._received_at[target] = begins_at + seconds

    def forget(self, node: int) -> None:
        """The number will be another node's."""
        self._sent_at.pop(node, None)
        self._received_at.pop(node, None)
