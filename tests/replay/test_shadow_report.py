"""What a shadow would have done, as a report shows it."""

from dataclasses import asdict

import pytest

from perigee.replay.shadow_report import SecondChecks, compare, differences, side_by_side
from perigee.scheduler.policies import PolicyNames
from perigee.scheduler.shadow import Decision

ACTING, SHADOW = PolicyNames(), PolicyNames("random", "early")


def decision(workers: str, ttft_s: float = 1.0, rejected: bool = False) -> Decision:
    prefill, decode = workers.split()
    return Decision(prefill, decode, ttft_s, ttft_s / 10, rejected)


JUDGED = [
    (decision("p0 d0", 1.0), decision("p0 d0", 1.0)),
    (decision("p0 d0", 2.0), decision("p1 d0", 4.0)),
    (decision("p0 d1", 3.0), decision("p1 d0", 7.0)),
    (decision("p0 d0", 50.0), decision("p1 d1", 90.0, rejected=True)),
    (decision("p0 d0", 50.0, rejected=True), decision("p0 d0", 90.0)),
    (decision("p0 d0", 50.0, rejected=True), decision("p0 d0", 90.0, rejected=True)),
]


def test_each_decision_is_compared() -> None:
    report = compare(ACTING, SHADOW, JUDGED)
    assert (report.decisions, report.both_served, report.both_rejected) == (6, 3, 1)
    assert (report.placed_elsewhere, report.other_prefill, report.other_decode) == (2, 2, 1)
    assert (report.rejections_made, report.rejections_avoided) == (1, 1)
    assert (report.acting.served, report.acting.rejected) == (report.shadow.served, report.shadow.rejected) == (4, 2)


def test_predictions_are_of_what_both_serve() -> None:
    report = compare(ACTING, SHADOW, JUDGED)
    assert asdict(report.acting.ttft_s) == pytest.approx({"mean": 2.0, "p50": 2.0, "p90": 2.8, "p99": 2.98})
    assert asdict(report.shadow.ttft_s) == pytest.approx({"mean": 4.0, "p50": 4.0, "p90": 6.4, "p99": 6.94})
    assert report.shadow.tbt_s.mean == pytest.approx(0.4)


def test_rows_say_of_how_many() -> None:
    report = compare(ACTING, SHADOW, JUDGED, SecondChecks(10, 5, 1).since(SecondChecks(2, 1, 1)))
    assert dict(differences(report)) == {
        "placed elsewhere": "2 of 3 (66.7%)",
        "  on another prefill worker": "2 of 3 (66.7%)",
        "  on another decode worker": "1 of 3 (33.3%)",
        "rejected what was served": "1 of 4 (25.0%)",
        "served what was rejected": "1 of 2 (50.0%)",
        "rejected after prefill what went on": "4 of 8 (50.0%)",
        "let go on what was rejected after prefill": "0 of 8 (0.0%)",
    }
    rows = {name: beside for name, *beside in side_by_side(report)}
    assert rows["placement"] == ["perigee", "random"]
    assert rows["predicted TTFT, p90"] == ["2,800.0 ms", "6,400.0 ms"]


def test_nothing_that_was_decided_is_no_error() -> None:
    report = compare(ACTING, SHADOW, [])
    assert (report.decisions, report.acting.ttft_s.mean) == (0, None)
    assert dict(differences(report))["placed elsewhere"] == "0 of 0"
