"""What the Conductor says. The driver carries these out; times are in seconds."""

from dataclasses import dataclass
from enum import IntEnum

from perigee.kvstore.blocks import BlockKey
from perigee.scheduler.ids import NodeId, ServerId, WorkerId
from perigee.workers.engine.sequence import Ref


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where to reach which incarnation of a worker."""

    id: WorkerId
    address: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Run it there. Sources name the store node to pull blocks from; empty means the worker's own has them.
    Of the prompts that wait for a worker, the one of the smallest `rank` goes first.
    """

    server: ServerId
    ref: Ref
    prefill: WorkerAddress
    decode: WorkerAddress
    prefill_source: str
    decode_source: str
    predicted_ttft_s: float
    predicted_tbt_s: float
    rank: float = 0.0


@dataclass(frozen=True, slots=True)
class Proceed:
    """The first token may go to the client, and decoding go on."""

    server: ServerId
    ref: Ref


class RejectReason(IntEnum):
    """Why a request is not served. The numbers are the wire's."""

    OVERLOAD = 0
    TOO_LARGE = 1
    UNAVAILABLE = 2


@dataclass(frozen=True, slots=True)
class Reject:
    """Not served, and nothing is kept of it. `retry_after_s` is 0 where trying again cannot help."""

    server: ServerId
    ref: Ref
    reason: RejectReason
    message: str
    retry_after_s: float = 0.0
    predicted_ttft_s: float = 0.0
    predicted_tbt_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Resync:
    """Events of this store node were missed: watch it anew, from a snapshot."""

    node_id: NodeId


@dataclass(frozen=True, slots=True)
class Exclude:
    """This incarnation of a worker shows another model card than the cluster's and gets no work; tell the operator."""

    worker_id: WorkerId
    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class Replicate:
    """The store node pulls these blocks, which follow each other, from the store node `source`."""

    node_id: NodeId
    source: NodeId
    parent: BlockKey
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Trim:
    """The store node drops its copies of these blocks, unless somebody uses them."""

    node_id: NodeId
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Drain:
    """From now on this Conductor gives the worker no more work; or, if not `draining`, some again. There is nothing to
    be done about it but to know.
    """

    worker_id: WorkerId
    incarnation: str
    draining: bool
    reason: str


@dataclass(frozen=True, slots=True)
class SetRole:
    """The worker, on which no request is, changes pools. Its next report says whether it did."""

    worker_id: WorkerId
    incarnation: str
    role: str


Command = Dispatch | Proceed | Reject | Resync | Exclude | Replicate | Trim | Drain | SetRole
ServerCommand = Dispatch | Proceed | Reject
