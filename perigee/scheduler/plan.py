"""What placement comes to: where a request goes, what is expected of that, and what else was considered."""

from dataclasses import dataclass

from perigee.scheduler.ids import WorkerId
from perigee.scheduler.worker_view import WorkerView


@dataclass(frozen=True, slots=True)
class PrefillEstimate:
    """What prefilling on one worker would come to, in seconds from now: its queue, pulling blocks from the store node
    `source` if one is named, taking over `prefix_tokens` from the local store, and computing `new_tokens`.
    """

    worker: WorkerView
    new_tokens: int
    prefix_tokens: int
    queue_s: float
    transfer_s: float
    load_s: float
    compute_s: float
    source: str = ""

    @property
    def seconds(self) -> float:
        """Until the first token."""
        return self.queue_s + self.transfer_s + self.load_s + self.compute_s


@dataclass(frozen=True, slots=True)
class DecodeEstimate:
    """The TBT to expect of one decode worker, in seconds, with the request in its batch."""

    worker: WorkerView
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The workers chosen for a request. Predictions count from its arrival at the front end.

    `considered` are the estimates of other prefill workers, as many as the policy keeps for the receipt.
    """

    prefill: PrefillEstimate
    decode: DecodeEstimate
    ttft_s: float
    tbt_s: float
    decode_source: str = ""
    considered: tuple[PrefillEstimate, ...] = ()
    considered_decode: tuple[DecodeEstimate, ...] = ()

    @property
    def workers(self) -> tuple[WorkerId, WorkerId]:
        return self.prefill.worker.id, self.decode.worker.id
