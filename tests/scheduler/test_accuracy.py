"""How predictions are held against what came."""

import pytest

from perigee.scheduler.cost.accuracy import Accuracy, ErrorSummary


def test_without_observations_all_is_zero() -> None:
    assert Accuracy().summary() == ErrorSummary()


def test_quantiles_mean_and_bias_are_of_relative_errors() -> None:
    accuracy = Accuracy()
    for predicted in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 0.4):
        accuracy.observe(predicted * 2.0, 2.0)
    summary = accuracy.summary()
    assert (summary.count, summary.p50, summary.bias) == (7, pytest.approx(0.3), pytest.approx(0.2))
    assert summary.p90 == pytest.approx(0.54)
    assert summary.mean == accuracy.mean == pytest.approx(0.3)


def test_only_the_last_ones_count() -> None:
    accuracy = Accuracy(window=3)
    for predicted in (10.0, 10.0, 1.0, 1.0, 1.0):
        accuracy.observe(predicted, 1.0)
    assert (accuracy.summary().p90, accuracy.summary().count, accuracy.observations) == (0.0, 3, 5)


def test_what_took_no_time_cannot_be_compared() -> None:
    accuracy = Accuracy()
    accuracy.observe(1.0, 0.0)
    assert accuracy.observations == 0
