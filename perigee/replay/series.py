"""What a run looked like over time, sampled."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

from perigee.replay.metrics import Outcome, RequestRecord, Slo, distribution


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment. Totals count since the start. What is not known of a cluster is None.

    `prefill_load_s` and `decode_load` are means over the workers of a phase: seconds of work that wait for a prefill
    worker, and the share of pages or places, whichever is scarcer, that is taken on a decode worker.
    """

    at_s: float
    in_flight: int
    completed: int
    good: int
    rejected: int
    failed: int
    queued_tokens: int | None = None
    prefill_load_s: float | None = None
    decode_load: float | None = None
    decoding: int | None = None


@dataclass(frozen=True, slots=True)
class Range:
    """Of a quantity over time: its mean, the band that holds nine tenths of its samples, and its peak."""

    mean: float
    low: float
    high: float
    peak: float


@dataclass(frozen=True, slots=True)
class State:
    """What the workers of a cluster carried at one moment, as in Sample. `decoding` counts all that hold a place."""

    at_s: float
    queued_tokens: int
    decode_load: float
    decoding: int


_LABELS = {
    "in_flight": "requests in flight",
    "decoding": "requests on decode workers",
    "queued_tokens": "prompt tokens that wait",
    "prefill_load_s": "work that waits for a prefill worker, s",
    "decode_load": "load of the decode workers",
}

NAMES = tuple(field.name for field in fields(Sample))


def columns(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """The series by their names, without those that are not known."""
    table = {name: [getattr(sample, name) for sample in samples] for name in NAMES}
    return {name: values for name, values in table.items() if None not in values}


def range_rows(samples: Sequence[Sample]) -> Iterator[tuple[str, ...]]:
    """The same as rows for people."""
    for name, each in ranges(samples).items():
        yield _LABELS[name], *(_number(value) for value in (each.mean, each.low, each.high, each.peak))


def tells_of_workers(samples: Sequence[Sample]) -> bool:
    """Whether what the cluster's workers carried is known."""
    return all(sample.decode_load is not None for sample in samples)


def ranges(samples: Sequence[Sample]) -> dict[str, Range]:
    """Of each series that is known and no total."""
    totals = {"at_s", "completed", "good", "rejected", "failed"}
    return {name: _range(values) for name, values in columns(samples).items() if values and name not in totals}


def samples_of(
    records: Sequence[RequestRecord], slo: Slo, states: Sequence[State] = (), period_s: float = 1.0
) -> tuple[Sample, ...]:
    """How many requests were in flight and what had become of them, at the time of each of `states`, in order, with
    what it says. Without any, at every `period_s`, and nothing more.
    """
    if not states:
        end_s = max((record.ended_s for record in records), default=0.0)
        return _counted(records, slo, [index * period_s for index in range(math.ceil(end_s / period_s) + 1)])
    counted = _counted(records, slo, [state.at_s for state in states])
    return tuple(replace(sample, **asdict(state)) for sample, state in zip(counted, states, strict=True))


def _counted(records: Sequence[RequestRecord], slo: Slo, times_s: Sequence[float]) -> tuple[Sample, ...]:
    """What the requests alone tell."""
    sent = sorted(record.sent_s for record in records)
    ended = {outcome: sorted(each.ended_s for each in records if each.outcome is outcome) for outcome in Outcome}
    good = sorted(record.ended_s for record in records if slo.met_by(record))
    samples = []
    for at_s in times_s:
        counts = {outcome: bisect_right(times, at_s) for outcome, times in ended.items()}
        samples.append(
            Sample(
                at_s,
                in_flight=bisect_right(sent, at_s) - sum(counts.values()),
                completed=counts[Outcome.COMPLETED],
                good=bisect_right(good, at_s),
                rejected=counts[Outcome.REJECTED],
                failed=counts[Outcome.FAILED],
            )
        )
    return tuple(samples)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _range(values: Sequence[float]) -> Range:
    ordered = sorted(values)
    middle = distribution(ordered)
    assert middle.mean is not None
    low, high = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.05, 0.95))
    return Range(middle.mean, low, high, ordered[-1])
