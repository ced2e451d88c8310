"""What a replay measures: one record a request, and the report over all of them.

TTFT and TBT are in seconds. A request's TBT is the mean of its slowest tenth of gaps between tokens, as in the
Mooncake paper (FAST '25), so that a stall shows however long the answer is.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import pairwise


class Outcome(StrEnum):
    """How a request ended. REJECTED is the endpoint's own 429; everything else that went wrong is FAILED."""

    COMPLETED = "completed"
    REJECTED = "rejected"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class CachedByTier:
    """Prompt tokens that were not computed, by where they were: in the node's memory, on its SSD, on another node."""

    dram: int = 0
    ssd: int = 0
    remote: int = 0

    @property
    def total(self) -> int:
        return self.dram + self.ssd + self.remote

    def __add__(self, other: "CachedByTier") -> "CachedByTier":
        return CachedByTier(self.dram + other.dram, self.ssd + other.ssd, self.remote + other.remote)


NOTHING_CACHED = CachedByTier()


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What came of one request. Times count from the start of the run.

    `due_s` is when the trace has the request arrive, `sent_s` when it was sent, from which its TTFT counts. `ttft_s`
    and `tbt_s` are None where no token came, `tbt_s` also where only one did. `failure` names the kind of failure and
    `detail` is what the endpoint said. `rejection` says why a request was rejected, as far as that is known.
    `cached_by_tier` is None where the endpoint does not tell, and so is what it predicted: the TTFT, and the mean of
    the gaps between tokens, which is `mean_tbt_s`. `request_id` is what the endpoint calls it, if it tells.
    """

    outcome: Outcome
    due_s: float
    sent_s: float
    ended_s: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float | None = None
    tbt_s: float | None = None
    failure: str = ""
    detail: str = ""
    rejection: str = ""
    cached_by_tier: CachedByTier | None = None
    priority: int = 0
    mean_tbt_s: float | None = None
    predicted_ttft_s: float | None = None
    predicted_tbt_s: float | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must meet to count as goodput; None asks for nothing."""

    ttft_s: float | None = None
    tbt_s: float | None = None

    def met_by(self, record: RequestRecord) -> bool:
        return (
            record.outcome is Outcome.COMPLETED
            and _within(record.ttft_s, self.ttft_s)
            and _within(record.tbt_s, self.tbt_s)
        )


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of seconds or ratios; all None where nothing was measured. Percentiles interpolate between neighbours, as numpy's
    do."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Failure:
    """How often one kind of failure happened, and what was said the first time."""

    count: int
    example: str


@dataclass(frozen=True, slots=True)
class PriorityReport:
    """Of the requests of one priority."""

    requests: int
    completed: int
    rejected: int
    goodput_ratio: float
    ttft_s: Distribution
    tbt_s: Distribution


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a replay; the field names are the keys of its JSON form.

    `requests` are those with an outcome, `unfinished` those that had none when the replay was interrupted. Throughput,
    latencies and tokens are of completed requests; `goodput_ratio` is over all with an outcome.
    `cached_token_ratio` is prompt tokens served from the cache over prompt tokens. `late_s` is how late the load
    generator itself was in sending: where it is not small, the measured load is not the trace's. The errors are of the
    endpoint's own predictions: |predicted - actual| / actual. `tbt_s` is of the requests' slowest tenths, `mean_tbt_s`
    of their means.
    """

    requests: int
    completed: int
    rejected: int
    failed: int
    unfinished: int
    ttft_s: Distribution
    tbt_s: Distribution
    mean_tbt_s: Distribution
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    goodput_ratio: float
    cached_token_ratio: float
    duration_s: float
    late_s: Distribution
    ttft_error: Distribution
    tbt_error: Distribution
    slo: Slo
    failures: dict[str, Failure]
    goodput_per_s: float = 0.0
    cached_by_tier: CachedByTier | None = None
    rejections: dict[str, int] = field(default_factory=dict)
    priorities: dict[int, PriorityReport] = field(default_factory=dict)

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2, allow_nan=False)


def mean_tbt_s(token_times_s: Sequence[float], num_tokens: int) -> float | None:
    """Mean of the gaps between `num_tokens` tokens, whose chunks arrived at these times, in order; None for fewer than
    two."""
    if num_tokens < 2 or not token_times_s:
        return None
    return (token_times_s[-1] - token_times_s[0]) / (num_tokens - 1)


def tail_tbt_s(token_times_s: Sequence[float], num_tokens: int) -> float | None:
    """Mean of the slowest tenth, at least one, of the gaps between `num_tokens` tokens; None for fewer than two.

    `token_times_s` is when something arrived, in order. Tokens that came together have one time and no gap between
    them, so there may be fewer times than tokens, and it does not matter which of them came together.
    """
    if num_tokens < 2:
        return None
    num_slowest = max((num_tokens - 1) // 10, 1)
    gaps_s = sorted((later - earlier for earlier, later in pairwise(token_times_s)), reverse=True)
    return sum(gaps_s[:num_slowest]) / num_slowest


def tail_tbt_of_runs(gaps: Iterable[tuple[float, int]]) -> float | None:
    """The same from runs of equal gaps, pairs of seconds and how many in a row; None if there are none."""
    slowest_first = sorted(gaps, reverse=True)
    num_gaps = sum(count for _, count in slowest_first)
    num_slowest = left = max(num_gaps // 10, 1)
    total_s = 0.0
    for seconds, count in slowest_first:
        total_s += seconds * min(count, left)
        left -= min(count, left)
    return total_s / num_slowest if num_gaps else None


def distribution(values: Iterable[float]) -> Distribution:
    ordered = sorted(values)
    if not ordered:
        return Distribution(None, None, None, None)
    mean = math.fsum(ordered) / len(ordered)
    return Distribution(mean, *(_percentile(ordered, fraction) for fraction in (0.5, 0.9, 0.99)))


def summarize(records: Sequence[RequestRecord], slo: Slo, unfinished: int = 0) -> Report:
    """The report over `records`, of a run that began at 0 s and ended with the last of them."""
    completed = [record for record in records if record.outcome is Outcome.COMPLETED]
    outcomes = Counter(record.outcome for record in records)
    prompt_tokens = sum(record.prompt_tokens for record in completed)
    output_tokens = sum(record.output_tokens for record in completed)
    duration_s = max((record.ended_s for record in records), default=0.0)
    return Report(
        requests=len(records),
        completed=outcomes[Outcome.COMPLETED],
        rejected=outcomes[Outcome.REJECTED],
        failed=outcomes[Outcome.FAILED],
        unfinished=unfinished,
        ttft_s=distribution(record.ttft_s for record in completed if record.ttft_s is not None),
        tbt_s=distribution(record.tbt_s for record in completed if record.tbt_s is not None),
        mean_tbt_s=distribution(record.mean_tbt_s for record in completed if record.mean_tbt_s is not None),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        output_tokens_per_s=_ratio(output_tokens, duration_s),
        goodput_ratio=_ratio(sum(slo.met_by(record) for record in records), len(records)),
        cached_token_ratio=_ratio(sum(record.cached_tokens for record in completed), prompt_tokens),
        duration_s=duration_s,
        late_s=distribution(record.sent_s - record.due_s for record in records),
        ttft_error=distribution(_errors((record.predicted_ttft_s, record.ttft_s) for record in completed)),
        tbt_error=distribution(_errors((record.predicted_tbt_s, record.mean_tbt_s) for record in completed)),
        slo=slo,
        failures=_failures(records),
        goodput_per_s=_ratio(sum(slo.met_by(record) for record in records), duration_s),
        cached_by_tier=_cached_by_tier(completed),
        rejections=_rejections(records),
        priorities={priority: _of_priority(records, slo, priority) for priority in _priorities(records)},
    )


def _cached_by_tier(completed: Iterable[RequestRecord]) -> CachedByTier | None:
    told = [record.cached_by_tier for record in completed if record.cached_by_tier is not None]
    return sum(told, NOTHING_CACHED) if told else None


def _rejections(records: Iterable[RequestRecord]) -> dict[str, int]:
    counts = Counter(record.rejection or "unknown" for record in records if record.outcome is Outcome.REJECTED)
    return dict(counts.most_common())


def _priorities(records: Iterable[RequestRecord]) -> list[int]:
    return sorted({record.priority for record in records}, reverse=True)


def _of_priority(records: Iterable[RequestRecord], slo: Slo, priority: int) -> PriorityReport:
    these = [record for record in records if record.priority == priority]
    completed = [record for record in these if record.outcome is Outcome.COMPLETED]
    return PriorityReport(
        requests=len(these),
        completed=len(completed),
        rejected=sum(record.outcome is Outcome.REJECTED for record in these),
        goodput_ratio=_ratio(sum(slo.met_by(record) for record in these), len(these)),
        ttft_s=distribution(record.ttft_s for record in completed if record.ttft_s is not None),
        tbt_s=distribution(record.tbt_s for record in completed if record.tbt_s is not None),
    )


def _errors(predicted_and_actual: Iterable[tuple[float | None, float | None]]) -> Iterator[float]:
    """The relative errors, where there was a prediction and something to compare it with."""
    for predicted, actual in predicted_and_actual:
        if predicted is not None and actual:
            yield abs(predicted - actual) / actual


def _failures(records: Iterable[RequestRecord]) -> dict[str, Failure]:
    failed = [record for record in records if record.outcome is Outcome.FAILED]
    examples = {record.failure: record.detail for record in reversed(failed)}
    counts = Counter(record.failure for record in failed)
    return {kind: Failure(count, examples[kind]) for kind, count in counts.most_common()}


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _within(measured: float | None, limit: float | None) -> bool:
    return measured is None or limit is None or measured <= limit


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
