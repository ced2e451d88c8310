"""What placement comes to: where a request goes, what is expected of that, and what else was considered."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from perigee.scheduler.cost.model import Quantity
from perigee.scheduler.ids import WorkerId
from perigee.scheduler.worker_view import WorkerView


class PrefillWay(NamedTuple):
    """How a prompt may be prefilled where a part of it is held: with `prefix_tokens` cached, of which `remote_tokens`
    are pulled from the store node `source`. Loading and computing are the profile's; a transfer begins after `wait_s`,
    or later if the node that pulls is busy with another.
    """

    new_tokens: int
    prefix_tokens: int
    load_s: float
    compute_s: float
    remote_tokens: int = 0
    source: str = ""
    transfer_s: float = 0.0
    wait_s: float = 0.0

    def cached_s(self, load_factor: Quantity, prefill_factor: Quantity) -> Quantity:
        """Seconds to the first token once all that is cached is here, by how far a worker is from the profile."""
        cached_s = prefill_factor * self.compute_s
        cached_s += load_factor * self.load_s
        return cached_s


class Spot(NamedTuple):
    """All that an estimate for one worker depends on beside the prompt: the number of its store node, how long its
    queue is and its node still receives, and how far it is from the profile.
    """

    worker: WorkerView
    number: int
    queue_s: float
    receives_s: float
    load_factor: float
    prefill_factor: float
    prefill_offset_s: float


class PrefillEstimate(NamedTuple):
    """What prefilling on one worker would come to, in seconds from now: its queue, pulling blocks from another store
    node with waiting for other transfers, taking over the prefix with reading some from its own node's SSD, and
    computing the rest.
    """

    worker: WorkerView
    way: PrefillWay
    queue_s: float
    transfer_s: float
    load_s: float
    compute_s: float
    ssd_tokens: int

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

    `others` are some of the other prefill workers, as many as the policy keeps for the receipt, and `estimate` tells
    what they would come to, which hardly anybody asks; `why` is what the policy has to say about its choice.
    """

    prefill: PrefillEstimate
    decode: DecodeEstimate
    ttft_s: float
    tbt_s: float
    decode_source: str = ""
    others: tuple[Spot, ...] = ()
    estimate: Callable[[Spot], PrefillEstimate] | None = None
    considered_decode: tuple[DecodeEstimate, ...] = ()
    why: str = ""

    @property
    def considered(self) -> tuple[PrefillEstimate, ...]:
        """What the others would come to."""
        return tuple(map(self.estimate, self.others)) if self.estimate is not None else ()

    @property
    def workers(self) -> tuple[WorkerId, WorkerId]:
        return self.prefill.worker.id, self.decode.worker.id
