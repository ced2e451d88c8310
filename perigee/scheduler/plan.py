"""What placement comes to: where a request goes, what is expected of that, and what else was considered."""

from dataclasses import dataclass
from typing import NamedTuple

from perigee.scheduler.cost.model import Quantity
from perigee.scheduler.ids import WorkerId
from perigee.scheduler.worker_view import WorkerView


class PrefillWay(NamedTuple):
    """How a prompt may be prefilled where a part of it is held: with `prefix_tokens` cached, of which `remote_tokens`
    are pulled from the store node `source`. Loading and computing are the profile's; a transfer begins after `wait_s`.
    """

    new_tokens: int
    prefix_tokens: int
    load_s: float
    compute_s: float
    remote_tokens: int = 0
    source: str = ""
    transfer_s: float = 0.0
    wait_s: float = 0.0

    def work_s(self, load_factor: Quantity, prefill_factor: Quantity) -> Quantity:
        """Seconds from a worker's turn to the first token, by how far it is from the profile."""
        return load_factor * self.load_s + prefill_factor * self.compute_s + (self.transfer_s + self.wait_s)


class PrefillEstimate(NamedTuple):
    """What prefilling on one worker would come to, in seconds from now: its queue, waiting for other transfers, pulling
    blocks from another store node, reading some from its own one's SSD, taking over the prefix, and computing the rest.
    """

    worker: WorkerView
    way: PrefillWay
    queue_s: float
    wait_s: float
    promote_s: float
    ssd_tokens: int
    load_factor: float
    prefill_factor: float
    prefill_offset_s: float

    @property
    def new_tokens(self) -> int:
        return self.way.new_tokens

    @property
    def prefix_tokens(self) -> int:
        return self.way.prefix_tokens

    @property
    def remote_tokens(self) -> int:
        return self.way.remote_tokens

    @property
    def source(self) -> str:
        """The store node that blocks are pulled from; empty if none are."""
        return self.way.source

    @property
    def transfer_s(self) -> float:
        return self.wait_s + self.way.transfer_s

    @property
    def load_s(self) -> float:
        return self.promote_s + self.load_factor * self.way.load_s

    @property
    def compute_s(self) -> float:
        return self.prefill_factor * self.way.compute_s + self.prefill_offset_s

    @property
    def work_s(self) -> float:
        """From the worker's turn to the first token."""
        return self.transfer_s + self.load_s + self.compute_s

    @property
    def seconds(self) -> float:
        """Until the first token."""
        return self.queue_s + self.work_s


class DecodeEstimate(NamedTuple):
    """The TBT to expect of one decode worker, in seconds, with the request in its batch."""

    worker: WorkerView
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The workers chosen for a request. Predictions count from its arrival at the front end.

    `considered` are the estimates of other prefill workers, as many as the policy keeps for the receipt, and `why` is
    what it has to say about its choice.
    """

    prefill: PrefillEstimate
    decode: DecodeEstimate
    ttft_s: float
    tbt_s: float
    decode_source: str = ""
    considered: tuple[PrefillEstimate, ...] = ()
    considered_decode: tuple[DecodeEstimate, ...] = ()
    why: str = ""

    @property
    def workers(self) -> tuple[WorkerId, WorkerId]:
        return self.prefill.worker.id, self.decode.worker.id
