"""Predictions and how they learn."""

import pytest

from perigee.scheduler.cost import HALF_LIFE_S, CostModel, CostProfile, WorkerCost
from tests.scheduler.cluster import PROFILE


def test_prefill_takes_longer_after_a_longer_prefix() -> None:
    profile = CostProfile()
    assert profile.prefill_s(100, 10_000) > profile.prefill_s(100, 0) > profile.prefill_s(50, 0)


def test_splitting_a_prompt_in_two_costs_one_more_fixed_part() -> None:
    profile = CostProfile()
    whole = profile.prefill_s(1000, 0)
    halves = profile.prefill_s(500, 0) + profile.prefill_s(500, 500)
    assert halves == pytest.approx(whole + profile.prefill_fixed_s)


def test_a_worker_that_is_slower_than_its_profile_is_predicted_so() -> None:
    cost = WorkerCost(PROFILE)
    for _ in range(100):
        cost.observe_prefill(1000, 0, load_s=0.0, compute_s=3.0)
    assert cost.prefill_s(2000, 0) == pytest.approx(6.0)


def test_corrections_follow_a_worker_that_changes() -> None:
    cost = WorkerCost(PROFILE)
    for step_s in [0.1] * 50 + [0.02] * 200:
        cost.observe_step(8, 1000, step_s)
    assert cost.step_s(8, 1000) == pytest.approx(0.02, rel=0.01)


def test_long_work_counts_for_more_than_short_work() -> None:
    cost = WorkerCost(PROFILE)
    cost.observe_prefill(10_000, 0, load_s=0.0, compute_s=20.0)
    cost.observe_prefill(1, 0, load_s=0.0, compute_s=0.5)  # five hundred times what was predicted
    assert cost.prefill.factor == pytest.approx(2.0, rel=0.05)


def test_what_took_no_time_teaches_nothing() -> None:
    cost = WorkerCost(PROFILE)
    cost.observe_prefill(1000, 0, load_s=0.0, compute_s=0.0)
    cost.observe_step(1, 10, 0.0)
    assert (cost.prefill.factor, cost.load.factor, cost.step.factor) == (1.0, 1.0, 1.0)


def test_the_error_of_predictions_shrinks_as_they_are_corrected() -> None:
    cost = WorkerCost(PROFILE)
    cost.observe_prefill(1000, 0, load_s=0.0, compute_s=4.0)
    assert cost.prefill.error.mean == pytest.approx(0.75)
    for _ in range(200):
        cost.observe_prefill(1000, 0, load_s=0.0, compute_s=4.0)
    assert cost.prefill.error.mean < 0.01
    assert cost.prefill.error.observations == 201


def test_a_new_worker_starts_from_what_the_others_showed() -> None:
    model = CostModel(PROFILE)
    old = model.new_worker()
    for _ in range(50):
        model.observe_prefill(old, new_tokens=1000, prefix_tokens=0, load_s=0.0, compute_s=2.0)
        model.observe_step(old, batch=1, context_tokens=0, step_s=0.022)
    new = model.new_worker()
    assert new.prefill_s(500, 0) == pytest.approx(1.0)
    assert new.step_s(1, 0) == pytest.approx(0.022)
    assert new.prefill.error.observations == 0


def a_slow_and_a_quick_worker(model: CostModel) -> tuple[WorkerCost, WorkerCost]:
    slow, quick = model.new_worker(), model.new_worker()
    model.observe_step(slow, batch=1, context_tokens=0, step_s=1.1)
    for _ in range(400):
        model.observe_step(quick, batch=1, context_tokens=0, step_s=0.011)
    assert (slow.step.factor, quick.step.factor) == (pytest.approx(100.0), pytest.approx(1.0))
    return slow, quick


def test_what_a_worker_does_not_show_again_fades_towards_what_is_typical() -> None:
    model = CostModel(PROFILE)
    slow, quick = a_slow_and_a_quick_worker(model)
    model.relax([slow, quick], now=10.0)
    model.relax([slow, quick], now=10.0 + HALF_LIFE_S)
    assert (slow.step.factor, quick.step.factor) == (pytest.approx(10.0, rel=0.01), pytest.approx(1.0))
    model.relax([slow, quick], now=10.0 + 20 * HALF_LIFE_S)
    assert slow.step.factor == pytest.approx(1.0, rel=0.01)


def test_what_a_worker_shows_again_and_again_stays() -> None:
    model = CostModel(PROFILE)
    slow, quick = a_slow_and_a_quick_worker(model)
    for second in range(600):
        model.observe_step(quick, batch=1, context_tokens=0, step_s=0.011)
        model.observe_step(slow, batch=1, context_tokens=0, step_s=1.1)
        model.relax([slow, quick], now=float(second))
    assert slow.step.factor == pytest.approx(100.0)


def test_a_faded_correction_follows_the_next_observation_quickly() -> None:
    model = CostModel(PROFILE)
    slow, quick = a_slow_and_a_quick_worker(model)
    for now in (0.0, 0.0, 10 * HALF_LIFE_S):
        model.relax([slow, quick], now)
    model.observe_step(slow, batch=1, context_tokens=0, step_s=0.022)
    assert slow.step.factor == pytest.approx(2.0, rel=0.01)
