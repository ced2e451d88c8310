"""A run as one HTML page: figures, latencies, load over time, hits by tier, rejections."""

from collections.abc import Iterator, Mapping, Sequence

from perigee.plots.page import Section, Table, page
from perigee.plots.svg import COLORS, Line, Plot
from perigee.replay.metrics import Distribution, Outcome, Report, RequestRecord
from perigee.replay.series import Sample, columns, ranges

_POINTS = 400  # of a curve, at the most: more do not show
_RATE_WINDOW_S = 30.0


def run_page(
    title: str, report: Report, records: Sequence[RequestRecord], samples: Sequence[Sample], about: Mapping[str, str]
) -> str:
    """The page's text. `about` says what was run."""
    sections = [
        Section("What was run", tables=[Table((), list(about.items()))]),
        Section("Figures", tables=list(_tables(report))),
        Section("Latencies", "Of completed requests.", plots=list(_latencies(records))),
        Section("Over time", tables=[_ranges_table(samples)], plots=list(_over_time(samples))),
    ]
    return page(title, sections)


# ---- tables


def _tables(report: Report) -> Iterator[Table]:
    counts = ("requests", "completed", "rejected", "failed", "unfinished", "prompt_tokens", "output_tokens")
    rows = [(name.replace("_", " "), f"{getattr(report, name):,}") for name in counts]
    rows.append(("output tokens/s", f"{report.output_tokens_per_s:,.1f}"))
    rows.append(("goodput", f"{report.goodput_ratio:.1%}"))
    rows.append(("duration", f"{report.duration_s:,.1f} s"))
    yield Table((), rows)
    seconds = (("TTFT", report.ttft_s), ("TBT", report.tbt_s), ("sent late", report.late_s))
    yield Table(("", "mean", "p50", "p90", "p99"), [(name, *_milliseconds(each)) for name, each in seconds])
    yield _hits(report)
    for title, counted in (("rejected", report.rejections), ("failed", _failures(report))):
        if counted:
            yield Table((title, "requests"), [(reason, f"{count:,}") for reason, count in counted.items()])
    if len(report.priorities) > 1:
        yield _priorities(report)


def _hits(report: Report) -> Table:
    rows = [("cached", f"{report.cached_token_ratio:.1%}")]
    if report.cached_by_tier:
        cached = report.cached_by_tier
        tiers = (("memory", cached.dram), ("SSD", cached.ssd), ("another node", cached.remote))
        rows += [(f"from {name}", f"{tokens / max(1, report.prompt_tokens):.1%}") for name, tokens in tiers]
    return Table(("prompt tokens", "share"), rows)


def _priorities(report: Report) -> Table:
    head = ("priority", "requests", "completed", "goodput", "TTFT p90")
    rows = [
        (f"{name}", f"{each.requests:,}", f"{each.completed:,}", f"{each.goodput_ratio:.1%}", _ms(each.ttft_s.p90))
        for name, each in report.priorities.items()
    ]
    return Table(head, rows)


def _failures(report: Report) -> dict[str, int]:
    return {kind: failure.count for kind, failure in report.failures.items()}


def _milliseconds(seconds: Distribution) -> list[str]:
    return [_ms(value) for value in (seconds.mean, seconds.p50, seconds.p90, seconds.p99)]


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:,.1f} ms"


def _ranges_table(samples: Sequence[Sample]) -> Table:
    rows = [
        (name.replace("_", " "), *(f"{value:,.3g}" for value in (each.mean, each.low, each.high, each.peak)))
        for name, each in ranges(samples).items()
    ]
    return Table(("", "mean", "p5", "p95", "peak"), rows)


# ---- plots


def _latencies(records: Sequence[RequestRecord]) -> Iterator[Plot]:
    done = [record for record in records if record.outcome is Outcome.COMPLETED]
    for name, values in (
        ("TTFT", [record.ttft_s for record in done if record.ttft_s]),
        ("TBT, slowest tenth", [record.tbt_s for record in done if record.tbt_s]),
    ):
        if values:
            line = Line(name, COLORS[0], _cumulative(values))
            yield Plot(name, "seconds", "share of requests", [line], from_zero=True, logarithmic=True, legend="bottom")


def _cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    ordered = sorted(values)
    return [(value, (index + 1) / len(ordered)) for index, value in _thinned(list(enumerate(ordered)))]


def _over_time(samples: Sequence[Sample]) -> Iterator[Plot]:
    """A plot for each group of series that there is."""
    table = columns(samples)
    times = table["at_s"]
    for title, unit, names in (
        ("Requests", "requests", ("in_flight", "decoding")),
        ("Prompt tokens that wait", "tokens", ("queued_tokens",)),
        ("Work that waits for a prefill worker", "seconds", ("prefill_load_s",)),
        ("Load of the decode workers", "share taken", ("decode_load",)),
    ):
        lines = [_line(index, name, times, table[name]) for index, name in enumerate(names) if name in table]
        if lines and times:
            yield Plot(title, "seconds", unit, lines, from_zero=True)
    if len(times) > 1:
        rates = [_line(index, name, times, _rates(samples, name)) for index, name in enumerate(("completed", "good"))]
        yield Plot("Throughput and goodput", "seconds", "requests/s", rates, from_zero=True)
        totals = [_line(index, name, times, table[name]) for index, name in enumerate(("rejected", "failed"))]
        yield Plot("Requests turned away or failed, in total", "seconds", "requests", totals, from_zero=True)


def _line(index: int, name: str, times: Sequence[float], values: Sequence[float]) -> Line:
    points = _thinned(list(zip(times, values, strict=True)))
    return Line(name.replace("_", " "), COLORS[index], points)


def _rates(samples: Sequence[Sample], name: str) -> list[float]:
    """Per second, over the window that ends at each sample."""
    totals = [getattr(sample, name) for sample in samples]
    period_s = max(samples[1].at_s - samples[0].at_s, 1e-9)
    window = max(1, round(_RATE_WINDOW_S / period_s))
    before = [totals[max(0, at - window)] for at in range(len(totals))]
    spans_s = [max(1, min(at, window)) * period_s for at in range(len(totals))]
    return [(total - earlier) / span_s for total, earlier, span_s in zip(totals, before, spans_s, strict=True)]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_POINTS` of them, the first and the last among these."""
    if len(points) <= _POINTS:
        return points
    step = (len(points) - 1) / (_POINTS - 1)
    return [points[round(index * step)] for index in range(_POINTS)]
