"""What a run looked like over time."""

import pytest

from perigee.replay.metrics import CachedByTier, Outcome, RequestRecord, Slo, summarize
from perigee.replay.page import run_page
from perigee.replay.series import Sample, columns, ranges, samples_of
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
        assert outline.tags.count("svg") == 5
        for figure in ("overload at arrival", "timeout", "from SSD", "3.0%", "priority", "500.0 ms"):
            assert figure in text
