"""A worker as the Conductor knows it: what it reported, and what was placed on it since."""

from dataclasses import dataclass, field

from perigee.scheduler.commands import WorkerAddress
from perigee.scheduler.cost import WorkerCost
from perigee.scheduler.ids import NodeId, RequestKey, WorkerId
from perigee.workers.engine.pages import pages_needed
from perigee.workers.messages import WorkerReport

# A worker hears of a placement through a server and reports it then: what is younger may not be in its report yet.
REPORT_LAG_S = 0.5


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request will take at the most: pages while its prompt is computed, as many as the prompt has blocks, and
    pages while it decodes.
    """

    prompt_pages: int
    pages: int
    num_tokens: int

    @classmethod
    def of(cls, num_tokens: int, max_len: int, block_tokens: int) -> "Demand":
        """Of a prompt of `num_tokens` that may come to `max_len` with its output, by the worker's own rule."""
        prompt_pages = pages_needed(num_tokens, num_tokens, block_tokens)
        return cls(prompt_pages, pages_needed(num_tokens, max_len, block_tokens), num_tokens)


NO_DEMAND = Demand(0, 0, 0)


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """What a decode worker has on its hands, or a part of that."""

    sequences: int = 0
    pages: int = 0
    context_tokens: int = 0

    def __add__(self, other: "DecodeLoad") -> "DecodeLoad":
        return DecodeLoad(
            self.sequences + other.sequences,
            self.pages + other.pages,
            self.context_tokens + other.context_tokens,
        )

    def beyond(self, other: "DecodeLoad") -> "DecodeLoad":
        """By how much this exceeds `other`, in each dimension."""
        return DecodeLoad(
            max(0, self.sequences - other.sequences),
            max(0, self.pages - other.pages),
            max(0, self.context_tokens - other.context_tokens),
        )


@dataclass(frozen=True, slots=True)
class PlacedPrefill:
    """A prompt that was sent to a worker and has not come to its first token."""

    new_tokens: int  # expected to be computed
    placed_at: float


@dataclass(frozen=True, slots=True)
class PlacedDecode:
    """A sequence that was sent to a worker to decode, from its dispatch on."""

    load: DecodeLoad
    ends_at: float  # predicted


@dataclass(slots=True)
class WorkerView:
    """One incarnation of a worker. All fields that change are the ClusterView's to fill."""

    id: WorkerId
    incarnation: str
    address: str
    store: NodeId
    cost: WorkerCost
    report: WorkerReport | None = None
    reported_at: float = 0.0
    excluded: bool = False  # its card differs from the cluster's
    draining: bool = False  # for another role: it gets no work
    last_chosen: int = 0  # ordinal of the last dispatch that chose it
    prefills: dict[RequestKey, PlacedPrefill] = field(default_factory=dict)
    decodes: dict[RequestKey, PlacedDecode] = field(default_factory=dict)
    # What the last report showed beyond what we had placed by then: another Conductor's doing, or a longer output.
    foreign: DecodeLoad = DecodeLoad()
    foreign_prefill_tokens: int = 0

    @property
    def where(self) -> WorkerAddress:
        return WorkerAddress(self.id, self.address, self.incarnation)

    @property
    def load(self) -> DecodeLoad:
        """Sequences and pages taken, also by what the worker has not reported yet."""
        return self.placed_load() + self.foreign

    @property
    def queued_prefill_tokens(self) -> int:
        """Tokens to compute before a new prompt's turn. Two upper bounds are known, and the smaller is taken: all that
        was placed (but some of it is computed by now), and the report with what was placed since.
        """
        reported = self.report.queued_prefill_tokens if self.report else 0
        since = self.reported_at - REPORT_LAG_S
        fresh = sum(prefill.new_tokens for prefill in self.prefills.values() if prefill.placed_at >= since)
        return min(self.placed_prefill_tokens() + self.foreign_prefill_tokens, reported + fresh)

    def placed_load(self) -> DecodeLoad:
        """The part of the load that this Conductor placed."""
        return sum((decode.load for decode in self.decodes.values()), DecodeLoad())

    def placed_prefill_tokens(self) -> int:
        """The part of the prefill queue that this Conductor placed, as if none of it were computed yet."""
        return sum(prefill.new_tokens for prefill in self.prefills.values())

    def take_report(self, report: WorkerReport, now: float) -> None:
        """Replaces the last report."""
        self.report = report
        self.reported_at = now
        used = DecodeLoad(
            report.running_sequences + report.queued_sequences,
            report.total_pages - report.free_pages,
            report.context_tokens,
        )
        self.foreign = used.beyond(self.placed_load())
        self.foreign_prefill_tokens = max(0, report.queued_prefill_tokens - self.placed_prefill_tokens())

    def could_prefill(self, demand: Demand) -> bool:
        """Whether it could hold the prompt if it had nothing else to do."""
        return self.report is not None and demand.prompt_pages <= self.report.total_pages

    def could_decode(self, demand: Demand) -> bool:
        """Whether it could hold the sequence to its end if it had nothing else to do."""
        return self.report is not None and demand.pages <= self.report.total_pages

    def has_room(self, demand: Demand) -> bool:
        """Whether it can take one more sequence now."""
        return self._has_room_beside(demand, self.load)

    def room_at(self, demand: Demand) -> float | None:
        """When enough of what was placed is predicted to have ended; None if its end would not be enough."""
        load = self.load
        for decode in sorted(self.decodes.values(), key=lambda decode: decode.ends_at):
            load = load.beyond(decode.load)
            if self._has_room_beside(demand, load):
                return decode.ends_at
        return None

    def step_s(self, demand: Demand) -> float:
        """Predicted TBT with this sequence in the batch."""
        load = self.load
        return self.cost.step_s(load.sequences + 1, load.context_tokens + demand.num_tokens)

    def _has_room_beside(self, demand: Demand, load: DecodeLoad) -> bool:
        report = self.report
        return (
            report is not None
            and load.sequences < report.max_sequences
            and load.pages + demand.pages <= report.total_pages
        )
