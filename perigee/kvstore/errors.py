"""What can go wrong between a store node and those who use it."""

from collections.abc import Iterable


class StoreError(Exception):
    """Anything the cache service says no to."""


class NoRoom(StoreError):
    """The arena has no room for the blocks now; leases that end may make some."""


class TooLarge(StoreError):
    """The arena could never hold the blocks, whatever is evicted."""


class InvalidRequest(StoreError):
    """The request itself is wrong."""


class Fenced(StoreError):
    """A commit came after its reservation's deadline. The slot is the writer's until it releases it."""


class QuotaExceeded(StoreError):
    """The tenant may not pin that many blocks."""


class BlocksMissing(StoreError):
    """Some of the fetched blocks did not come in time. `indices` are theirs in the request's keys."""

    def __init__(self, indices: Iterable[int]) -> None:
        self.indices = tuple(indices)
        super().__init__(f"{len(self.indices)} blocks did not come in time, by index: {list(self.indices[:8])}")


class StoreClosed(StoreError):
    """The connection to the node is gone, and with it every lease and reservation made over it."""


class MalformedFrame(StoreError):
    """Bytes on the local socket that are no message of its protocol. The connection that sent them is closed."""


class CorruptRecord(StoreError):
    """A record on SSD is not what it should be. It is a miss; the others are not in doubt."""


class TierFailed(StoreError):
    """The SSD tier cannot go on: the disk is full, read-only, missing, in use or broken. Serving goes on without it."""
