"""How long answers are expected to be."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.scheduler.lengths import LengthModel


def mean(model: LengthModel, num_tokens: int, limit: int, tenant: str = "") -> float:
    """The expected length: the sum over n of P(longer than n)."""
    odds = model.odds(num_tokens, limit, tenant)
    return sum(model.survival(odds, generated) for generated in range(limit))


ANSWERS = st.lists(
    st.tuples(
        st.integers(1, 200_000),  # tokens of the prompt
        st.integers(1, 5000),  # the limit
        st.sampled_from(["", "a", "b"]),
        st.integers(1, 5000),  # tokens of the answer, were there no limit
    ),
    max_size=40,
)


def learned(answers: list[tuple[int, int, str, int]]) -> LengthModel:
    model = LengthModel()
    for num_tokens, limit, tenant, output in answers:
        model.observe(num_tokens, limit, tenant, min(limit, output))
    return model


@settings(max_examples=50)
@given(ANSWERS, st.integers(1, 200_000), st.integers(1, 5000), st.sampled_from(["", "a", "c"]))
def test_survival_is_one_at_first_falls_and_is_zero_from_the_limit_on(
    answers: list[tuple[int, int, str, int]], num_tokens: int, limit: int, tenant: str
) -> None:
    model = learned(answers)
    odds = model.odds(num_tokens, limit, tenant)
    alive = [model.survival(odds, generated) for generated in np.linspace(0, limit, 50)]
    assert alive[0] == pytest.approx(1.0)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(alive))
    assert alive[-1] == 0.0
    assert min(alive) >= 0.0


@settings(max_examples=50)
@given(ANSWERS, st.integers(2, 5000), st.integers(0, 5000), st.integers(0, 5000))
def test_the_longer_it_has_run_the_longer_it_will_be(
    answers: list[tuple[int, int, str, int]], limit: int, age: int, more: int
) -> None:
    """P(longer than n) given an age is never less than given a smaller age, for the same n."""
    model = learned(answers)
    odds = model.odds(100, limit)
    target = model.survival(odds, min(limit - 1, age + more))
    older, younger = model.survival(odds, min(age, limit - 1)), model.survival(odds, min(age // 2, limit - 1))
    assert target / older >= target / younger - 1e-9


def test_before_any_answer_has_ended_some_hundred_tokens_are_expected_or_the_limit_if_that_is_short() -> None:
    model = LengthModel()
    assert model.survival(model.odds(100, 30), 29) == pytest.approx(1.0)
    assert 200 < mean(model, 100, 4000) < 800


def test_answers_that_run_into_their_limits_say_nothing_of_others_lengths_but_of_limits() -> None:
    model = learned([(100, limit, "", 10_000) for limit in (50, 100, 200, 400)] * 20)
    odds = model.odds(100, 150)
    assert model.survival(odds, 149) > 0.99


def test_a_magnitude_of_prompts_is_told_apart_once_it_has_shown_enough() -> None:
    model = learned([(100, 4000, "", 20), (10_000, 4000, "", 1000)] * 100)
    assert mean(model, 100, 4000) < 150
    assert mean(model, 10_000, 4000) > 800


def test_a_tenant_with_few_answers_is_taken_for_what_all_are() -> None:
    model = learned([(100, 4000, "a", 100)] * 200)
    before = mean(model, 100, 4000, "b")
    model.observe(100, 4000, "b", 2000)
    after = mean(model, 100, 4000, "b")
    assert before == pytest.approx(100, rel=0.1)
    assert after < 500


def test_what_comes_lately_counts_for_more() -> None:
    model = learned([(100, 4000, "", 2000)] * 1000 + [(100, 4000, "", 20)] * 2000)
    assert mean(model, 100, 4000) < 300


def test_what_has_outlived_all_others_may_go_on() -> None:
    model = learned([(100, 4000, "", 50)] * 100)
    odds = model.odds(100, 4000)
    assert model.survival(odds, 2000) / model.survival(odds, 1000) == pytest.approx(0.5, rel=0.4)


def test_memory_is_bounded_however_many_tenants_there_are() -> None:
    model = LengthModel()
    for index in range(2000):
        model.observe(1 << (index % 17), 1 << (index % 13), f"tenant-{index}", 1)
    assert len(model._groups) < 256


def test_an_answer_whose_group_gives_way_is_not_taken_for_one_of_the_group_that_takes_its_place() -> None:
    model = learned([(1000, 4000, "a", 20)] * 200)
    odds = model.odds(1000, 4000, "a")
    for index in range(1000):
        model.observe(1000, 4000, "busy", 20)
        if index % 3 == 0:
            model.observe(60, 4000, f"long{index}", 3000)
            model.odds(60, 4000, f"long{index}")
    assert model.survival(odds, 500) < 0.6  # as all of them
