"""How a replay shows itself: a progress bar while it runs, then a table, and JSON for machines."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from perigee.replay.errors import ReplayError
from perigee.replay.metrics import Distribution, Outcome, Report, Slo

STDOUT = "-"


class ReplayProgress:
    """A progress bar on standard error, if that is a terminal; a context manager."""

    def __init__(self, num_requests: int) -> None:
        console = Console(stderr=True)
        self._outcomes: Counter[Outcome] = Counter()
        self._bar = Progress(
            TextColumn("replay"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[outcomes]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("replay", total=num_requests, outcomes="")

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


def check_json_file(json_file: str | None) -> None:
    """Raises ReplayError if the report could not be written there: better known before the replay than after it."""
    if json_file in (None, STDOUT):
        return
    try:
        with Path(str(json_file)).open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ReplayError(f"json: cannot write to {json_file!r}: {error.strerror}") from error


def write_report(report: Report, json_file: str | None) -> None:
    """The table goes to standard output and JSON to `json_file`; where that is `-`, the table makes way for it."""
    console = Console(stderr=json_file == STDOUT)
    console.print(as_text(report))
    for kind, failure in report.failures.items():
        console.print(f"{failure.count} × {kind}, the first: {failure.example}", markup=False, highlight=False)
    if json_file == STDOUT:
        sys.stdout.write(report.as_json() + "\n")
        sys.stdout.flush()
    elif json_file is not None:
        Path(json_file).write_text(report.as_json() + "\n", encoding="utf-8")


def as_text(report: Report) -> Group:
    """All that is in `report` but the examples of failures, for people: a table of latencies and one of the rest."""
    latencies = Table("", *(Column(name, justify="right") for name in ("mean", "p50", "p90", "p99")))
    for name, seconds in (("TTFT", report.ttft_s), ("TBT", report.tbt_s), ("sent late", report.late_s)):
        latencies.add_row(name, *_milliseconds(seconds))
    figures = Table(show_header=False)
    for row in _figures(report):
        figures.add_row(*row)
    return Group(latencies, figures)


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
    yield "duration", f"{report.duration_s:.1f} s"


def _bounds(slo: Slo) -> str:
    bounds = (("TTFT", slo.ttft_s), ("TBT", slo.tbt_s))
    return ", ".join(f"{name} ≤ {bound_s:g} s" for name, bound_s in bounds if bound_s is not None)


def _milliseconds(seconds: Distribution) -> list[str]:
    values = (seconds.mean, seconds.p50, seconds.p90, seconds.p99)
    return ["–" if value is None else f"{value * 1000:.1f} ms" for value in values]


def _count_outcomes(outcomes: Counter[Outcome]) -> str:
    return " ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
