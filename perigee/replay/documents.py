"""What a Perigee endpoint tells of its cluster and its decisions, as far as reports show it: `GET /cluster` and
`GET /requests/{id}/receipt`.
"""

from pydantic import BaseModel, Field

from perigee.replay.metrics import CachedByTier
from perigee.replay.series import State
from perigee.replay.shadow_report import Judged, SecondChecks
from perigee.scheduler.policies import PolicyNames
from perigee.scheduler.shadow import Decision


class Load(BaseModel, frozen=True):
    """What a worker carries, and what it could."""

    queued_prefill_tokens: int
    running_sequences: int
    free_pages: int
    total_pages: int
    max_sequences: int

    @property
    def taken(self) -> float:
        """The share of pages or places, whichever is scarcer, that is taken."""
        pages = 1 - self.free_pages / self.total_pages if self.total_pages else 0.0
        return max(pages, self.running_sequences / self.max_sequences if self.max_sequences else 0.0)


class Worker(BaseModel, frozen=True):
    role: str
    load: Load


class ShadowSums(BaseModel, frozen=True):
    """A shadow, and what is counted of it since the Conductor's start."""

    placement: str
    admission: str
    second_checks: int
    second_rejections_made: int
    second_rejections_avoided: int

    @property
    def names(self) -> PolicyNames:
        return PolicyNames(self.placement, self.admission)

    @property
    def second(self) -> SecondChecks:
        return SecondChecks(self.second_checks, self.second_rejections_made, self.second_rejections_avoided)


class Cluster(BaseModel, frozen=True):
    """The answer of `GET /cluster`."""

    workers: tuple[Worker, ...]
    shadow: ShadowSums | None = None

    def state(self, at_s: float) -> State:
        """What the workers carry, which they told at `at_s` of the run's clock."""
        decoders = [worker.load for worker in self.workers if worker.role in ("decode", "mixed")]
        return State(
            at_s,
            queued_tokens=sum(worker.load.queued_prefill_tokens for worker in self.workers if worker.role != "decode"),
            decode_load=sum(load.taken for load in decoders) / len(decoders) if decoders else 0.0,
            decoding=sum(load.running_sequences for load in decoders),
        )


class Chosen(BaseModel, frozen=True):
    worker: str


class Plan(BaseModel, frozen=True):
    predicted_ttft_s: float
    predicted_tbt_s: float
    prefill: Chosen
    decode: Chosen

    def decision(self, rejected: bool) -> Decision:
        return Decision(self.prefill.worker, self.decode.worker, self.predicted_ttft_s, self.predicted_tbt_s, rejected)


class Rejection(BaseModel, frozen=True):
    reason: str


class Verdict(BaseModel, frozen=True):
    rejection: Rejection | None
    plan: Plan


class Cached(BaseModel, frozen=True):
    dram: int
    ssd: int
    remote: int


class Actual(BaseModel, frozen=True):
    cached_tokens: Cached | None = None


class Attempt(BaseModel, frozen=True):
    dispatched: bool
    plan: Plan | None
    shadow: Verdict | None
    actual: Actual | None

    @property
    def judged(self) -> Judged | None:
        """What was decided, and what the shadow would have; None where it was not asked."""
        if self.plan is None or self.shadow is None:
            return None
        ours = self.plan.decision(rejected=not self.dispatched)
        return ours, self.shadow.plan.decision(rejected=self.shadow.rejection is not None)


class Policies(BaseModel, frozen=True):
    placement: str
    admission: str


class Choice(BaseModel, frozen=True):
    policies: Policies
    attempts: tuple[Attempt, ...]


class Receipt(BaseModel, frozen=True):
    """The answer of `GET /requests/{id}/receipt`."""

    choices: tuple[Choice, ...] = Field(min_length=1)

    @property
    def policies(self) -> PolicyNames:
        """That decided."""
        names = self.choices[0].policies
        return PolicyNames(names.placement, names.admission)

    @property
    def judged(self) -> list[Judged]:
        """Each decision that a shadow was asked about as well."""
        attempts = (attempt for choice in self.choices for attempt in choice.attempts)
        return [judged for attempt in attempts if (judged := attempt.judged) is not None]

    @property
    def cached_by_tier(self) -> CachedByTier | None:
        """Of the first attempt whose prompt was computed; None if there was none."""
        for attempt in self.choices[0].attempts:
            if attempt.actual is not None and attempt.actual.cached_tokens is not None:
                cached = attempt.actual.cached_tokens
                return CachedByTier(cached.dram, cached.ssd, cached.remote)
        return None
