"""What can go wrong with a benchmark."""


class BenchError(Exception):
    """Base of all."""


class PeerFailed(BenchError):
    """A peer's process ended without figures. Says which, and what it last wrote."""


class NotConvertible(BenchError):
    """A checkpoint has no counterpart in a peer's format. Names what stands in the way."""
