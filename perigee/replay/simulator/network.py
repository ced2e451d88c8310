"""What moves between nodes, and between tiers, and how long it waits for its turn.

A link serves one transfer after the other at its bandwidth, which is in tokens of KVCache per second. A NIC has a link
in each direction, and a transfer runs over two of them, cut through: it arrives when the slower of both is done with
it, but keeps neither waiting for the other.
"""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Link:
    """First come, first served. `moved_tokens` counts since the start."""

    tokens_per_s: float
    free_at: float = 0.0
    moved_tokens: int = 0

    def book(self, tokens: int, since: float) -> tuple[float, float]:
        """From when until when it is busy with so many tokens that were there to be moved since then."""
        start = max(self.free_at, since)
        self.free_at = start + tokens / self.tokens_per_s
        self.moved_tokens += tokens
        return start, self.free_at


@dataclass(slots=True)
class Nic:
    """A node's link to all others."""

    out: Link
    into: Link

    @classmethod
    def of(cls, tokens_per_s: float) -> "Nic":
        return cls(Link(tokens_per_s), Link(tokens_per_s))


@dataclass(slots=True)
class Network:
    """`latency_s` from one node to another. What is computed layer by layer is sent layer by layer, of `layers`."""

    latency_s: float
    layers: int
    nics: dict[str, Nic] = field(default_factory=dict)

    def send(self, source: str, target: str, tokens: int, since: float, now: float) -> float:
        """When blocks arrive whose layers were computed one after the other from `since` until now."""
        sender, receiver = self.nics[source].out, self.nics[target].into
        begun, sent = sender.book(tokens, since + (now - since) / self.layers)
        _, received = receiver.book(tokens, begun)
        last_layer_s = tokens / min(sender.tokens_per_s, receiver.tokens_per_s) / self.layers
        return max(sent, received, now + last_layer_s) + self.latency_s
