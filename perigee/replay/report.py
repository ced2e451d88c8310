"""How a run shows itself: a progress bar while it runs, then tables, a page with plots, and JSON for machines."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from perigee.output import STDOUT, publish
from perigee.replay.metrics import Distribution, Outcome, Report, RequestRecord, Slo
from perigee.replay.page import hits_by_tier, run_page
from perigee.replay.series import Sample, columns, range_rows, tells_of_workers
from perigee.replay.shadow_report import ShadowReport, differences, side_by_side


class ReplayProgress:
    """A progress bar on standard error, if that is a terminal; a context manager."""

    def __init__(self, num_requests: int, what: str = "replay") -> None:
        console = Console(stderr=True)
        self._outcomes: Counter[Outcome] = Counter()
        self._bar = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[outcomes]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=num_requests, outcomes="")

    def advance(self, outcome: Outcome) -> None:
        """One more request has ended."""
        self._outcomes[outcome] += 1
        self._bar.update(self._task, advance=1, outcomes=_count_outcomes(self._outcomes))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


@dataclass(frozen=True, slots=True)
class Run:
    """All that a report is made of. `about` says what was run; `records` are of `report`, in any order."""

    title: str
    about: Mapping[str, str]
    report: Report
    records: Sequence[RequestRecord]
    samples: Sequence[Sample]
    shadow: ShadowReport | None = None

    def as_json(self) -> str:
        """The report's fields, and besides them the series by their names, and what a shadow would have done."""
        fields = {
            **asdict(self.report),
            "about": dict(self.about),
            "series": columns(self.samples),
            "shadow": asdict(self.shadow) if self.shadow else None,
        }
        return json.dumps(fields, indent=2, allow_nan=False)


def write_run(run: Run, json_file: str | None, html: Path | None) -> None:
    """Tables go to standard output, the page to `html`, and JSON to `json_file`; where that is `-`, the tables make way
    for it. Raises ConfigurationError if a file cannot be written.
    """
    report = run.report
    console = Console(stderr=json_file == STDOUT)
    console.print(as_text(report, run.samples, run.shadow))
    for kind, failure in report.failures.items():
        console.print(f"{failure.count} × {kind}, the first: {failure.example}", markup=False, highlight=False)
    if html is not None:
        publish(run_page(run.title, report, run.records, run.samples, run.about, run.shadow), "html", html)
    if json_file is not None:
        publish(run.as_json() + "\n", "json", json_file)


def as_text(report: Report, samples: Sequence[Sample] = (), shadow: ShadowReport | None = None) -> Group:
    """All that is in `report` but the examples of failures, for people, what the samples come to, and what a shadow
    would have done.
    """
    latencies = Table("", *_right("mean", "p50", "p90", "p99"))
    for name, seconds in (
        ("TTFT", report.ttft_s),
        ("TBT, slowest tenth", report.tbt_s),
        ("TBT, mean", report.mean_tbt_s),
        ("sent late", report.late_s),
    ):
        latencies.add_row(name, *_milliseconds(seconds))
    figures = Table(show_header=False)
    for row in _figures(report):
        figures.add_row(*row)
    return Group(latencies, figures, *_more(report, samples), *(_shadow(shadow) if shadow else ()))


def _more(report: Report, samples: Sequence[Sample]) -> Iterator[Table]:
    if report.rejections:
        rejections = Table("rejected", *_right("requests"))
        for reason, count in report.rejections.items():
            rejections.add_row(Text(reason), f"{count}")  # the endpoint's word, which is no markup
        yield rejections
    if len(report.priorities) > 1:
        yield _priorities(report)
    if samples:
        series = Table("over time", *_right("mean", "p5", "p95", "peak"))
        for row in range_rows(samples):
            series.add_row(*row)
        if not tells_of_workers(samples):
            series.add_row("what workers carried", "not told")
        yield series


def _shadow(report: ShadowReport) -> Iterator[Table]:
    table = Table("the same requests", *_right("acting", "shadow"), title="What a shadow would have done")
    for row in side_by_side(report):
        table.add_row(*row)
    yield table
    others = Table("the shadow would have", *_right("decisions"))
    for what, decisions in differences(report):
        others.add_row(what, decisions)
    yield others


def _priorities(report: Report) -> Table:
    table = Table("priority", *_right("requests", "completed", "goodput", "TTFT p90"))
    for priority, each in report.priorities.items():
        p90 = _milliseconds(each.ttft_s)[2]
        table.add_row(f"{priority}", f"{each.requests}", f"{each.completed}", f"{each.goodput_ratio:.1%}", p90)
    return table


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def _figures(report: Report) -> Iterator[tuple[str, str]]:
    yield "requests", f"{report.requests}"
    yield "completed", f"{report.completed}"
    yield "rejected", f"{report.rejected}"
    yield "failed", f"{report.failed}"
    if report.unfinished:
        yield "unfinished", f"{report.unfinished}"
    yield "output tokens/s", f"{report.output_tokens_per_s:.1f}"
    yield "goodput", f"{report.goodput_ratio:.1%} {_bounds(report.slo)}".rstrip()
    yield "cached tokens", f"{report.cached_token_ratio:.1%}"
    for name, share in hits_by_tier(report):
        yield f"  {name}", share
    for name, error in (("TTFT", report.ttft_error), ("TBT", report.tbt_error)):
        if error.p50 is not None and error.p90 is not None:
            yield f"{name} predicted", f"to {error.p50:.1%}, 90% of them to {error.p90:.1%}"
    yield "duration", f"{report.duration_s:.1f} s"


def _bounds(slo: Slo) -> str:
    bounds = (("TTFT", slo.ttft_s), ("TBT", slo.tbt_s))
    return ", ".join(f"{name} ≤ {bound_s:g} s" for name, bound_s in bounds if bound_s is not None)


def _milliseconds(seconds: Distribution) -> list[str]:
    values = (seconds.mean, seconds.p50, seconds.p90, seconds.p99)
    return ["–" if value is None else f"{value * 1000:.1f} ms" for value in values]


def _count_outcomes(outcomes: Counter[Outcome]) -> str:
    return " ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
