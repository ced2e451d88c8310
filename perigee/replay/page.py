"""A run as one HTML page: figures, latencies, load over time, hits by tier, rejections, and a shadow's decisions."""

from collections.abc import Iterator, Mapping, Sequence

from perigee.plots.page import Section, Table, page
from perigee.replay.curves import hits_over_time, latencies, over_time
from perigee.replay.metrics import Distribution, Report, RequestRecord
from perigee.replay.series import Sample, range_rows, tells_of_workers
from perigee.replay.shadow_report import ShadowReport, differences, side_by_side

_UNTOLD = "What its workers carry, and which tier hits came from, was not told by this endpoint."
_COMPARED = (
    "Another set of policies was asked about each request as it arrived, and obeyed in nothing. Each decision is about"
    " the cluster as the acting policies made it. Predictions are of the requests that both would serve."
)


def run_page(
    title: str,
    report: Report,
    records: Sequence[RequestRecord],
    samples: Sequence[Sample],
    about: Mapping[str, str],
    shadow: ShadowReport | None = None,
) -> str:
    """The page's text. `about` says what was run."""
    told = "" if tells_of_workers(samples) else _UNTOLD
    plots = [*over_time(samples), *hits_over_time(records)]
    sections = [
        Section("What was run", tables=[Table((), list(about.items()))]),
        Section("Figures", tables=list(_tables(report))),
        Section("Latencies", "Of completed requests.", plots=list(latencies(records))),
        Section("Over time", told, tables=[_ranges_table(samples)], plots=plots),
    ]
    return page(title, [*sections, *(_shadow(shadow) if shadow else ())])


def _tables(report: Report) -> Iterator[Table]:
    counts = ("requests", "completed", "rejected", "failed", "unfinished", "prompt_tokens", "output_tokens")
    rows = [(name.replace("_", " "), f"{getattr(report, name):,}") for name in counts]
    rows.append(("output tokens/s", f"{report.output_tokens_per_s:,.1f}"))
    rows.append(("goodput", f"{report.goodput_ratio:.1%}"))
    rows.append(("duration", f"{report.duration_s:,.1f} s"))
    yield Table((), rows)
    seconds = (
        ("TTFT", report.ttft_s),
        ("TBT, slowest tenth", report.tbt_s),
        ("TBT, mean", report.mean_tbt_s),
        ("sent late", report.late_s),
    )
    yield Table(("", "mean", "p50", "p90", "p99"), [(name, *_milliseconds(each)) for name, each in seconds])
    yield _hits(report)
    if predictions := list(_predictions(report)):
        yield Table(("predicted", "half of them to", "nine tenths to"), predictions)
    for title, counted in (("rejected", report.rejections), ("failed", _failures(report))):
        if counted:
            yield Table((title, "requests"), [(reason, f"{count:,}") for reason, count in counted.items()])
    if len(report.priorities) > 1:
        yield _priorities(report)


def _predictions(report: Report) -> Iterator[tuple[str, str, str]]:
    for name, error in (("TTFT", report.ttft_error), ("TBT", report.tbt_error)):
        if error.p50 is not None and error.p90 is not None:
            yield name, f"{error.p50:.1%}", f"{error.p90:.1%}"


def _hits(report: Report) -> Table:
    return Table(("prompt tokens", "share"), [("cached", f"{report.cached_token_ratio:.1%}"), *hits_by_tier(report)])


def hits_by_tier(report: Report) -> Iterator[tuple[str, str]]:
    """Rows for people: where prompt tokens were found, and their share of all prompt tokens."""
    cached = report.cached_by_tier
    if cached is None:
        yield "by tier", "not told"
        return
    untold = report.cached_token_ratio * report.prompt_tokens - cached.total
    for name, tokens in (("in memory", cached.dram), ("on SSD", cached.ssd), ("on another node", cached.remote)):
        yield name, f"{tokens / max(1, report.prompt_tokens):.1%}"
    if untold > 0.5:
        yield "in a tier that was not told", f"{untold / report.prompt_tokens:.1%}"


def _shadow(report: ShadowReport) -> Iterator[Section]:
    beside = Table(("", "acting", "shadow"), list(side_by_side(report)))
    others = Table(("the shadow would have", "decisions"), list(differences(report)))
    yield Section("What a shadow would have done", _COMPARED, tables=[beside, others])


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
    return Table(("", "mean", "p5", "p95", "peak"), list(range_rows(samples)))
