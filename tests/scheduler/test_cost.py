"""Predictions and how they learn."""

import numpy as np
import pytest

from perigee.scheduler.cost import CostModel, CostProfile, WorkerCost
from perigee.scheduler.cost.corrections import Handling
from perigee.scheduler.cost.model import HALF_LIFE_S
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
        cost.observe_prefill(1000, 0, 3.0)
    assert cost.prefill_s(2000, 0) == pytest.approx(6.0)


def test_corrections_follow_a_worker_that_changes() -> None:
    cost = WorkerCost(PROFILE)
    for step_s in [0.1] * 50 + [0.02] * 200:
        cost.observe_step(8, 1000, step_s)
    assert cost.step_s(8, 1000) == pytest.approx(0.02, rel=0.01)


def test_long_work_counts_for_more_than_short_work() -> None:
    cost = WorkerCost(PROFILE)
    cost.observe_prefill(10_000, 0, 20.0)
    cost.observe_prefill(1, 0, 0.5)  # five hundred times what was predicted
    assert cost.prefill.factor == pytest.approx(2.0, rel=0.05)


def test_prompts_that_share_a_step_are_not_each_taken_for_as_slow_as_the_step() -> None:
    model = CostModel(PROFILE)
    cost = model.new_worker()
    for step in range(1, 50):
        for _ in range(4):  # 1000 tokens, a second each as predicted, in one step of four seconds
            model.observe_prefill(cost, 4.0 * step, new_tokens=1000, prefix_tokens=0, load_s=0.0, compute_s=4.0)
    assert cost.prefill.factor == pytest.approx(1.0, rel=0.2)


def test_a_prompt_whose_beginning_was_in_the_step_before_is_counted_from_there_on() -> None:
    model = CostModel(PROFILE)
    cost = model.new_worker()
    model.observe_prefill(cost, 10.0, new_tokens=1000, prefix_tokens=0, load_s=0.0, compute_s=1.0)
    model.observe_prefill(cost, 11.0, new_tokens=1000, prefix_tokens=0, load_s=0.0, compute_s=1.8)
    assert cost.prefill.factor == pytest.approx(1.0)


def test_a_stall_hardly_moves_a_prediction_but_a_slower_worker_is_followed() -> None:
    cost = WorkerCost(PROFILE)
    for _ in range(50):
        cost.observe_step(1, 0, 0.011)
    cost.observe_step(1, 0, 60.0)
    assert cost.step.factor < 1.3
    for _ in range(100):
        cost.observe_step(1, 0, 1.1)
    assert cost.step.factor == pytest.approx(100.0, rel=0.05)


def test_what_even_the_shortest_prompt_takes_is_learned() -> None:
    cost = WorkerCost(PROFILE)
    for turn in range(100):
        tokens = (20, 300, 1500)[turn % 3]
        cost.observe_prefill(tokens, 0, 0.05 + 0.5 * PROFILE.prefill_s(tokens, 0))
    assert (cost.prefill.factor, cost.prefill.offset_s) == (pytest.approx(0.5, rel=0.05), pytest.approx(0.05, rel=0.1))
    assert cost.prefill_s(100, 0) == pytest.approx(0.1, rel=0.05)


def test_prompts_of_one_size_say_nothing_of_an_offset() -> None:
    cost = WorkerCost(PROFILE)
    for _ in range(100):
        cost.observe_prefill(1000, 0, 3.0)
    assert (cost.prefill.factor, cost.prefill.offset_s) == (pytest.approx(3.0), pytest.approx(0.0, abs=1e-6))


def test_what_is_faster_than_a_line_through_nothing_has_no_offset() -> None:
    cost = WorkerCost(PROFILE)
    for turn in range(100):
        tokens = (20, 1500)[turn % 2]
        cost.observe_prefill(tokens, 0, max(1e-4, PROFILE.prefill_s(tokens, 0) - 0.05))
    assert cost.prefill.offset_s == 0.0
    assert cost.prefill_s(1500, 0) == pytest.approx(1.45, rel=0.05)


def test_an_offset_fades_as_a_factor_does() -> None:
    model = CostModel(PROFILE)
    cost = model.new_worker()
    for turn in range(100):
        cost.observe_prefill((20, 1500)[turn % 2], 0, 0.05 + PROFILE.prefill_s((20, 1500)[turn % 2], 0))
    model.relax([cost], 0.0)
    before_s = cost.prefill.offset_s
    model.relax([cost], 0.0)
    model.relax([cost], HALF_LIFE_S)
    assert cost.prefill.offset_s == pytest.approx(before_s / 2)
    cost.observe_prefill(1500, 0, 1.55)  # what is left of the observations is in keeping with that
    assert cost.prefill.offset_s == pytest.approx(before_s / 2, rel=0.1)


def test_loading_has_a_part_that_each_prompt_takes() -> None:
    profile = CostProfile(load_fixed_s=2e-3, load_token_s=1e-5)
    assert (profile.load_s(0), profile.load_s(1000)) == (2e-3, pytest.approx(12e-3))


def test_handling_is_learned_and_a_stall_does_not_move_it_far() -> None:
    handling = Handling()
    handling.observe(0.008)
    assert handling.seconds == 0.008
    handling.observe(-0.001)  # clocks of two processes
    for _ in range(50):
        handling.observe(0.010)
    handling.observe(1.0)
    assert handling.seconds == pytest.approx(0.0125, rel=0.05)


def test_many_predictions_are_made_at_once() -> None:
    profile = CostProfile(step_experts_s=0.01, step_expert_share=0.1)
    new, prefix = np.array([10.0, 1000.0]), np.array([0.0, 5000.0])
    for predict in (profile.prefill_s, profile.step_s):
        together = predict(new, prefix)
        assert together.tolist() == pytest.approx([predict(10, 0), predict(1000, 5000)])
    assert profile.mixed_s(new, prefix, new, new).shape == (2,)


def test_a_small_batch_reads_few_experts_and_a_large_one_all() -> None:
    profile = CostProfile(step_fixed_s=0.0, step_sequence_s=0.0, step_experts_s=1.0, step_expert_share=0.1)
    assert (profile.step_s(0, 0), profile.step_s(1, 0)) == (0.0, pytest.approx(0.1))
    assert profile.step_s(100, 0) == pytest.approx(1.0, abs=1e-4)


def test_what_took_no_time_teaches_nothing() -> None:
    model = CostModel(PROFILE)
    cost = model.new_worker()
    model.observe_prefill(cost, 0.0, new_tokens=1000, prefix_tokens=0, load_s=0.0, compute_s=0.0)
    model.observe_step(cost, batch=1, context_tokens=10, step_s=0.0)
    assert (cost.prefill.factor, cost.load.factor, cost.step.factor) == (1.0, 1.0, 1.0)


def test_a_new_worker_starts_from_what_the_others_showed() -> None:
    model = CostModel(PROFILE)
    old = model.new_worker()
    for second in range(50):
        model.observe_prefill(old, 2.0 * second, new_tokens=1000, prefix_tokens=0, load_s=0.0, compute_s=2.0)
        model.observe_step(old, batch=1, context_tokens=0, step_s=0.022)
    new = model.new_worker()
    assert new.prefill_s(500, 0) == pytest.approx(1.0)
    assert new.step_s(1, 0) == pytest.approx(0.022)


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
