"""A worker as the Conductor knows it: what it reported, and what was placed on it since."""

from dataclasses import dataclass, field

from perigee.scheduler.commands import WorkerAddress
from perigee.scheduler.cost import WorkerCost
from perigee.scheduler.ids import NodeId, RequestKey, WorkerId
from perigee.scheduler.prompt_queue import PlacedPrefill, PromptQueue
from perigee.workers.engine.pages import pages_needed
from perigee.workers.messages import WorkerReport

# A worker frees a sequence's pages a moment after its front end has the last token, and reports it then.
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


@dataclass(slots=True)
class WorkerView:
    """One incarnation of a worker. All fields that change are the ClusterView's to fill."""

    id: WorkerId
    incarnation: str
    where: WorkerAddress
    store: NodeId
    cost: WorkerCost
    row: int  # in the Fleet
    queue: PromptQueue
    report: WorkerReport | None = None
    reported_at: float = 0.0
    excluded: bool = False  # its card differs from the cluster's
    draining: bool = False  # for another role: it gets no work
    last_chosen: int = 0  # ordinal of the last dispatch that chose it
    decodes: dict[RequestKey, DecodeLoad] = field(default_factory=dict)  # from their dispatch on
    placed: DecodeLoad = DecodeLoad()  # the part of the load that this Conductor placed: the sum of `decodes`
    # What the last report showed beyond what we had placed by then: another Conductor's doing, or a longer output.
    foreign: DecodeLoad = DecodeLoad()
    ended: list[tuple[float, DecodeLoad]] = field(default_factory=list)  # lately: when, and what it took

    @property
    def prefills(self) -> dict[RequestKey, PlacedPrefill]:
        """The prompts that were sent to it and have not come to their first token."""
        return self.queue.prompts

    @property
    def load(self) -> DecodeLoad:
        """Sequences and pages taken, also by what the worker has not reported yet."""
        return self.placed + self.foreign

    def add_decode(self, key: RequestKey, load: DecodeLoad) -> None:
        """A sequence was sent to it to decode."""
        self.decodes[key] = load
        self.placed += load

    def remove_decode(self, key: RequestKey, now: float) -> None:
        """Does nothing if it is not there."""
        if load := self.decodes.pop(key, None):
            self.placed = self.placed.beyond(load)
            self.ended.append((now, load))

    def take_report(self, report: WorkerReport, now: float) -> None:
        """Replaces the last report."""
        self.report = report
        self.reported_at = now
        used = DecodeLoad(
            report.running_sequences + report.queued_sequences,
            report.total_pages - report.free_pages,
            report.context_tokens,
        )
        self.ended = [(at, load) for at, load in self.ended if now - at <= REPORT_LAG_S]
        self.foreign = used.beyond(sum((load for _, load in self.ended), self.placed))
        self.queue.take_report(report.queued_prefill_tokens, self.cost, now)

    @property
    def room(self) -> int:
        """The pages that one more sequence could have now; -1 if there is no place for one in the batch."""
        report = self.report
        if report is None or self.placed.sequences + self.foreign.sequences >= report.max_sequences:
            return -1
        return report.total_pages - self.placed.pages - self.foreign.pages
