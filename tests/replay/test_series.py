"""What a run looked like over time."""

import pytest

from perigee.replay.curves import hits_over_time, over_time
from perigee.replay.metrics import CachedByTier, Outcome, RequestRecord, Slo, summarize
from perigee.replay.page import hits_by_tier, run_page
from perigee.replay.series import Sample, State, columns, ranges, samples_of, tells_of_workers
from tests.plots.test_plots import Outline

RECORDS = [
    RequestRecord(Outcome.COMPLETED, 0.0, 0.0, 2.5, 100, 40, 5, 0.5, 0.1, cached_by_tier=CachedByTier(30, 6, 4)),
    RequestRecord(Outcome.COMPLETED, 0.5, 0.5, 1.5, 100, 0, 5, 0.9, 0.9, priority=1),
    RequestRecord(Outcome.REJECTED, 1.2, 1.2, 1.3, rejection="overload at arrival"),
    RequestRecord(Outcome.FAILED, 2.0, 2.0, 3.1, failure="timeout", detail="late"),
]
SLO = Slo(1.0, 0.2)


def test_samples_count_what_was_in_flight_and_what_had_become_of_it() -> None:
    samples = samples_of(RECORDS, SLO)
    assert [sample.at_s for sample in samples] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [sample.in_flight for sample in samples] == [1, 2, 2, 1, 0]
    assert [sample.completed for sample in samples] == [0, 0, 1, 2, 2]
    assert [sample.good for sample in samples] == [0, 0, 0, 1, 1]
    assert [(sample.rejected, sample.failed) for sample in samples][-2:] == [(1, 0), (1, 1)]


def test_what_is_not_known_is_no_series() -> None:
    assert set(columns(samples_of(RECORDS, SLO))) == {"at_s", "in_flight", "completed", "good", "rejected", "failed"}


def test_samples_are_of_the_times_at_which_the_cluster_told_what_it_carries() -> None:
    samples = samples_of(RECORDS, SLO, [State(0.7, 900, 0.25, 1), State(2.2, 0, 0.5, 3)])
    assert samples == (
        Sample(0.7, 2, 0, 0, 0, 0, queued_tokens=900, decode_load=0.25, decoding=1),
        Sample(2.2, 2, 1, 0, 1, 0, queued_tokens=0, decode_load=0.5, decoding=3),
    )
    assert tells_of_workers(samples) and not tells_of_workers(samples_of(RECORDS, SLO))


def test_throughput_is_over_the_last_half_minute_however_far_apart_samples_are() -> None:
    samples = [Sample(at_s, 0, completed, 0, 0, 0) for at_s, completed in ((0, 0), (10, 10), (40, 100), (100, 100))]
    (rates,) = (plot for plot in over_time(samples) if plot.title == "Throughput and goodput")
    assert rates.lines[0].points == [(0, 0.0), (10, 1.0), (40, 3.0), (100, 0.0)]


def test_hits_by_tier_are_shares_of_all_prompt_tokens_so_far() -> None:
    early = RequestRecord(Outcome.COMPLETED, 0.0, 0.0, 1.0, 100, cached_by_tier=CachedByTier(50, 0, 0))
    (plot,) = hits_over_time([RECORDS[0], early])
    assert [line.points for line in plot.lines] == [
        [(1.0, 0.5), (2.5, 0.4)],
        [(1.0, 0.0), (2.5, 0.03)],
        [(1.0, 0.0), (2.5, 0.02)],
    ]


def test_the_page_says_how_good_predictions_were() -> None:
    record = RequestRecord(Outcome.COMPLETED, 0.0, 0.0, 2.0, 100, 0, 10, ttft_s=0.25, predicted_ttft_s=0.3)
    text = run_page("Run", summarize([record], SLO), [record], samples_of([record], SLO), {})
    assert "<td>20.0%</td><td>20.0%</td>" in text


def test_what_was_not_told_is_said() -> None:
    untold = RequestRecord(Outcome.COMPLETED, 0.0, 0.0, 2.5, 100, 40, 5, 0.5, 0.1)
    text = run_page("Run", summarize([untold], SLO), [untold], samples_of([untold], SLO), {})
    assert "not told by this endpoint" in text and "by tier</td><td" in text and "from the cache, so far" not in text


def test_hits_of_a_tier_that_was_told_for_some_requests_only_are_kept_apart() -> None:
    untold = RequestRecord(Outcome.COMPLETED, 0.0, 0.0, 2.5, 100, 40, 5, 0.5, 0.1)
    assert dict(hits_by_tier(summarize([RECORDS[0], untold], SLO))) == {
        "in memory": "15.0%",
        "on SSD": "3.0%",
        "on another node": "2.0%",
        "in a tier that was not told": "20.0%",
    }


def test_ranges_hold_nine_tenths_of_the_samples() -> None:
    samples = [Sample(float(index), index, 0, 0, 0, 0, decode_load=0.5) for index in range(101)]
    of = ranges(samples)
    assert set(of) == {"in_flight", "decode_load"}
    assert (of["in_flight"].mean, of["in_flight"].low, of["in_flight"].high, of["in_flight"].peak) == (50, 5, 95, 100)


def test_nothing_at_all_makes_one_empty_sample() -> None:
    assert samples_of([], SLO) == (Sample(0.0, 0, 0, 0, 0, 0),)


@pytest.mark.parametrize("records", [RECORDS, []])
def test_the_page_shows_a_run_whatever_came_of_it(records: list[RequestRecord]) -> None:
    text = run_page("Run", summarize(records, SLO), records, samples_of(records, SLO), {"trace": "<t>"})
    outline = Outline(text)
    assert outline.open == [] and "&lt;t&gt;" in text
    if records:
        assert outline.tags.count("svg") == 6
        for figure in ("overload at arrival", "timeout", "on SSD", "3.0%", "priority", "500.0 ms"):
            assert figure in text
