"""What the Conductor hears. Times are in seconds; none of these carries a clock reading: `handle` is given it."""

from dataclasses import dataclass

from perigee.kvstore.blocks import BlockKey
from perigee.kvstore.messages import BlockEvent
from perigee.scheduler.ids import NodeId, ServerId, WorkerId
from perigee.scheduler.slo import NO_SLO, Slo
from perigee.workers.engine.sequence import Ref
from perigee.workers.messages import WorkerReport

# ---- from front ends


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """One attempt wants to be placed. A newer attempt at the same choice takes the place of the older.

    `num_tokens` counts the prompt and, after a failure, the output so far; `max_tokens` what may still come;
    `block_keys` has one key per block of `num_tokens`, the last, partial one included. `age_s`: since the client asked.
    Of requests that wait, those of higher `priority` go first, and those of one `tenant` not before all others'.
    """

    server: ServerId
    ref: Ref
    block_keys: tuple[BlockKey, ...]
    num_tokens: int
    max_tokens: int
    age_s: float = 0.0
    tenant: str = ""
    priority: int = 0
    slo: Slo = NO_SLO


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The first token is there. Times are the worker's own, but `ttft_s`, which the server measured.

    Of the `cached_tokens`, so many came from the local SSD and from other store nodes; the rest from local memory.
    """

    server: ServerId
    ref: Ref
    cached_tokens: int = 0
    queue_s: float = 0.0
    load_s: float = 0.0
    compute_s: float = 0.0
    ttft_s: float = 0.0
    cached_ssd_tokens: int = 0
    cached_remote_tokens: int = 0

    @property
    def cached_dram_tokens(self) -> int:
        return self.cached_tokens - self.cached_ssd_tokens - self.cached_remote_tokens


@dataclass(frozen=True, slots=True)
class Joined:
    """The decode worker has all blocks and decodes."""

    server: ServerId
    ref: Ref


@dataclass(frozen=True, slots=True)
class Finished:
    """The client has its whole answer. Mean and longest TBT are 0 if there were fewer than two tokens."""

    server: ServerId
    ref: Ref
    output_tokens: int = 0
    mean_tbt_s: float = 0.0
    max_tbt_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt is over; the server may submit the next one. `worker_id` is who failed it, empty if nobody did."""

    server: ServerId
    ref: Ref
    worker_id: WorkerId
    code: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nobody wants the answer any more."""

    server: ServerId
    ref: Ref


@dataclass(frozen=True, slots=True)
class ServerLost:
    """A front end's stream broke: its requests are no longer ours to count."""

    server: ServerId


# ---- from workers and store nodes


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker can be reached. Another incarnation of the same id is thereby gone. Its WorkerReport says the rest."""

    worker_id: WorkerId
    incarnation: str
    address: str
    store: NodeId


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker left, or its stream broke."""

    worker_id: WorkerId
    incarnation: str


@dataclass(frozen=True, slots=True)
class BlockEvents:
    """Changes of a store node's blocks, numbered without gaps from `first_seq`, snapshots included.

    A `snapshot` replaces all that was known of the node. `num_slots` is how many blocks it can hold, 0 while that
    is not known.
    """

    node_id: NodeId
    incarnation: str
    first_seq: int
    events: tuple[BlockEvent, ...]
    snapshot: bool = False
    num_slots: int = 0


@dataclass(frozen=True, slots=True)
class StoreLost:
    """A store node left, or its stream broke."""

    node_id: NodeId
    incarnation: str


# ---- from the clock


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed. Comes about every second."""


RequestEvent = RequestArrived | PrefillDone | Joined | Finished | Failed | Cancelled
# Those that never call for a command.
QuietEvent = Joined | Finished | Failed | Cancelled | ServerLost | WorkerJoined | WorkerLost | StoreLost
Event = RequestArrived | PrefillDone | WorkerReport | BlockEvents | Tick | QuietEvent
