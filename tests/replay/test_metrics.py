"""The report says what the records say."""

import json
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perigee.replay.metrics import (
    Distribution,
    Outcome,
    RequestRecord,
    Slo,
    distribution,
    mean_tbt_s,
    summarize,
    tail_tbt_s,
)

seconds = st.floats(0, 100, allow_nan=False)


def completed(ttft_s: float = 1.0, tbt_s: float | None = 0.1, ended_s: float = 2.0, cached: int = 0) -> RequestRecord:
    return RequestRecord(Outcome.COMPLETED, 0.0, 0.5, ended_s, 100, cached, 10, ttft_s, tbt_s)


def ended(outcome: Outcome, failure: str = "", detail: str = "") -> RequestRecord:
    return RequestRecord(outcome, 0.0, 0.0, 1.0, failure=failure, detail=detail)


@given(st.lists(seconds, min_size=1))
def test_percentiles_are_those_of_numpy(values: list[float]) -> None:
    got = distribution(values)
    expected = [np.mean(values), *np.percentile(values, [50, 90, 99])]
    assert [got.mean, got.p50, got.p90, got.p99] == pytest.approx(expected)


def test_nothing_measured_is_not_zero() -> None:
    assert distribution([]) == Distribution(None, None, None, None)


@given(st.lists(seconds, min_size=1))
def test_tbt_is_the_mean_of_the_slowest_tenth_of_gaps(gaps: list[float]) -> None:
    times = list(accumulate(gaps, initial=1.0))
    slowest = sorted(np.diff(times), reverse=True)[: max(len(gaps) // 10, 1)]
    assert tail_tbt_s(times, len(times)) == pytest.approx(np.mean(slowest))


def test_one_stall_of_an_otherwise_smooth_answer_is_its_tbt() -> None:
    assert tail_tbt_s([0.0, 0.1, 0.2, 5.2, 5.3], 5) == pytest.approx(5.0)


def test_tokens_that_came_together_have_no_gap_between_them() -> None:
    # 41 tokens in 3 chunks: of 40 gaps, 2 are not zero, and the slowest tenth are 4.
    assert tail_tbt_s([0.0, 1.0, 4.0], 41) == pytest.approx((1.0 + 3.0 + 0 + 0) / 4)


@pytest.mark.parametrize(("times", "num_tokens"), [([], 0), ([1.0], 1), ([1.0, 1.1], 1)])
def test_fewer_than_two_tokens_have_no_tbt(times: list[float], num_tokens: int) -> None:
    assert tail_tbt_s(times, num_tokens) is None


@pytest.mark.parametrize(
    ("times", "num_tokens", "mean_s"), [([], 0, None), ([1.0], 1, None), ([1.0, 2.0, 4.0], 4, 1.0), ([1.0], 3, 0.0)]
)
def test_the_mean_of_gaps_does_not_depend_on_which_tokens_came_together(
    times: list[float], num_tokens: int, mean_s: float | None
) -> None:
    assert mean_tbt_s(times, num_tokens) == mean_s


def test_errors_of_predictions_are_relative_to_what_came() -> None:
    record = replace(completed(ttft_s=2.0), mean_tbt_s=0.1, predicted_ttft_s=1.0, predicted_tbt_s=0.11)
    report = summarize([record, replace(record, predicted_ttft_s=2.0), completed(), ended(Outcome.REJECTED)], Slo())
    assert (report.ttft_error.p50, report.ttft_error.mean) == (0.25, 0.25)
    assert report.tbt_error.p90 == pytest.approx(0.1)


def test_an_endpoint_that_predicts_nothing_has_no_errors() -> None:
    assert summarize([completed()], Slo()).ttft_error == Distribution(None, None, None, None)


def test_counts_and_rates() -> None:
    records = [
        completed(ended_s=4.0, cached=50),
        completed(cached=100),
        ended(Outcome.REJECTED),
        ended(Outcome.FAILED, "http_500", "first"),
        ended(Outcome.FAILED, "http_500", "second"),
        ended(Outcome.FAILED, "timeout"),
    ]
    report = summarize(records, Slo(), unfinished=3)
    assert (report.requests, report.completed, report.rejected, report.failed) == (6, 2, 1, 3)
    assert report.unfinished == 3
    assert report.duration_s == 4.0
    assert report.output_tokens_per_s == 5.0
    assert report.cached_token_ratio == 0.75
    assert {kind: (failure.count, failure.example) for kind, failure in report.failures.items()} == {
        "http_500": (2, "first"),
        "timeout": (1, ""),
    }


@pytest.mark.parametrize(
    ("slo", "ratio"),
    [(Slo(), 0.75), (Slo(ttft_s=1.0), 0.5), (Slo(tbt_s=0.1), 0.5), (Slo(1.0, 0.1), 0.25), (Slo(0.1, 0.1), 0.0)],
)
def test_goodput_is_what_met_all_slos_over_everything(slo: Slo, ratio: float) -> None:
    records = [completed(1.0, 0.1), completed(1.0, 0.2), completed(3.0, None), ended(Outcome.REJECTED)]
    assert summarize(records, slo).goodput_ratio == ratio


def test_latencies_are_of_completed_requests_and_count_from_sending() -> None:
    report = summarize([completed(1.0, None), completed(3.0, 0.5), ended(Outcome.FAILED)], Slo())
    assert report.ttft_s.mean == 2.0
    assert report.tbt_s.mean == 0.5
    assert report.late_s.mean == pytest.approx(1 / 3)


def test_a_report_of_nothing_is_valid_json() -> None:
    report = json.loads(summarize([], Slo()).as_json())
    assert report["requests"] == 0
    assert report["ttft_s"] == {"mean": None, "p50": None, "p90": None, "p99": None}


def test_json_has_the_promised_keys() -> None:
    report = json.loads(summarize([completed()], Slo(1.0, 0.1)).as_json())
    assert report.keys() >= {
        "requests",
        "completed",
        "rejected",
        "failed",
        "ttft_s",
        "tbt_s",
        "output_tokens_per_s",
        "goodput_ratio",
        "cached_token_ratio",
        "duration_s",
    }
    assert report["tbt_s"] == {"mean": 0.1, "p50": 0.1, "p90": 0.1, "p99": 0.1}
    assert report["slo"] == {"ttft_s": 1.0, "tbt_s": 0.1}
