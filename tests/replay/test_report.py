"""What people see of a replay."""

from io import StringIO

import pytest
from rich.console import Console

from perigee.configuration import ConfigurationError
from perigee.replay.metrics import Outcome, Report, RequestRecord, Slo, summarize
from perigee.replay.report import ReplayProgress, Run, as_text, write_run


def shown(report: Report) -> list[list[str]]:
    text = StringIO()
    Console(width=100, file=text).print(as_text(report))
    return [line.replace("│", " ").split() for line in text.getvalue().splitlines()]


def test_the_table_shows_every_figure() -> None:
    record = RequestRecord(Outcome.COMPLETED, 0.0, 0.001, 2.0, 100, 25, 10, ttft_s=0.25, tbt_s=0.0125, mean_tbt_s=0.01)
    lines = shown(summarize([record, RequestRecord(Outcome.REJECTED, 0.0, 0.0, 1.0)], Slo(1.0, 0.1), unfinished=7))
    assert ["TTFT", *["250.0", "ms"] * 4] in lines
    assert ["TBT,", "slowest", "tenth", *["12.5", "ms"] * 4] in lines
    assert ["TBT,", "mean", *["10.0", "ms"] * 4] in lines
    for figures in (
        ["requests", "2"],
        ["completed", "1"],
        ["rejected", "1"],
        ["failed", "0"],
        ["unfinished", "7"],
        ["output", "tokens/s", "5.0"],
        ["goodput", *["50.0%", "TTFT", "≤", "1", "s,", "TBT", "≤", "0.1", "s"]],
        ["cached", "tokens", "25.0%"],
        ["duration", "2.0", "s"],
    ):
        assert figures in lines


def test_what_an_endpoint_calls_a_rejection_is_shown_as_it_is() -> None:
    rejected = RequestRecord(Outcome.REJECTED, 0.0, 0.0, 1.0, rejection="[/busy] [red]later")
    assert ["[/busy]", "[red]later", "1"] in shown(summarize([rejected], Slo()))


def test_a_disk_that_is_full_is_named() -> None:
    run = Run("title", {}, summarize([], Slo()), (), ())
    with pytest.raises(ConfigurationError, match="--json: '/dev/full' cannot be written: No space left on device"):
        write_run(run, "/dev/full", None)


def test_the_table_shows_how_good_predictions_were_where_there_were_any() -> None:
    record = RequestRecord(Outcome.COMPLETED, 0.0, 0.0, 2.0, 100, 0, 10, ttft_s=0.25, predicted_ttft_s=0.3)
    lines = shown(summarize([record], Slo()))
    assert ["TTFT", "predicted", *["to", "20.0%,", "90%", "of", "them", "to", "20.0%"]] in lines
    assert not any(line[:2] == ["TBT", "predicted"] for line in lines)


def test_what_was_not_measured_is_a_dash() -> None:
    assert ["TTFT", "–", "–", "–", "–"] in shown(summarize([], Slo()))


def test_the_progress_bar_counts_outcomes_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    with ReplayProgress(3) as progress:
        progress.advance(Outcome.COMPLETED)
        progress.advance(Outcome.REJECTED)
    printed = capsys.readouterr()
    assert "2/3" in printed.err
    assert "1 completed 1 rejected" in printed.err
    assert printed.out == ""
