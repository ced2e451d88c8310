"""What admission policies make of more than a cluster can take, in virtual time."""

from dataclasses import replace

import numpy as np
import pytest

from tests.scheduler.overload import PROFILE, Ask, Outcome, Overload

pytestmark = pytest.mark.slow

# Each prompt takes about twenty seconds to compute, on one of very many workers: the lag between admission and load.
SLOW_PROMPTS = replace(PROFILE, prefill_token_s=1.7e-3, prefill_pair_s=0.0, step_context_token_s=2.5e-7)
# Prompts of very different lengths, and prefill is not for nothing.
MIXED_PROMPTS = replace(PROFILE, prefill_token_s=1e-4, step_context_token_s=2.5e-7)


def asks(count: int, rate: float, spread: float, answer: float = 350.0) -> list[Ask]:
    """Poisson arrivals; prompts around 12,000 tokens."""
    random = np.random.default_rng(1)
    at = np.cumsum(random.exponential(1 / rate, count))
    prompts = np.clip(random.lognormal(np.log(12_000) - spread**2 / 2, spread, count), 500, 100_000).astype(int)
    answers = np.clip(random.lognormal(np.log(answer) - 0.5, 1.0, count), 2, 2000).astype(int)
    return [Ask(float(a), int(p), int(o)) for a, p, o in zip(at, prompts, answers, strict=True)]


def swing(outcome: Outcome, begin: int, end: int) -> float:
    """By how much the decode pool's load is usually off its mean."""
    return float(np.std(outcome.load[begin:end]))


@pytest.fixture(scope="module")
def lagging() -> dict[str, Outcome]:
    """So many prefill workers that their time is no object, and decode workers that are too few."""
    requests = asks(2000, rate=6.0, spread=0.0, answer=200.0)
    policies = ("at-decode", "early", "perigee")
    return {name: Overload(name, prefill=160, decode=4, profile=SLOW_PROMPTS).run(requests) for name in policies}


def test_the_load_swings_less_under_a_forecast_than_under_todays_load(lagging: dict[str, Outcome]) -> None:
    assert swing(lagging["perigee"], 120, 330) < 0.8 * swing(lagging["early"], 120, 330)


def test_the_more_is_foreseen_the_less_is_computed_in_vain(lagging: dict[str, Outcome]) -> None:
    in_vain = [lagging[name].rejected_late for name in ("at-decode", "early", "perigee")]
    assert in_vain[0] > 2 * in_vain[1]
    assert in_vain[1] > 1.5 * in_vain[2]


def test_what_is_let_in_keeps_its_promise(lagging: dict[str, Outcome]) -> None:
    outcome = lagging["perigee"]
    assert outcome.good >= 0.95 * outcome.finished


def test_nobody_is_refused_where_there_is_room_for_all() -> None:
    requests = asks(600, rate=2.0, spread=0.0)
    outcome = Overload("perigee", prefill=60, decode=4, profile=SLOW_PROMPTS).run(requests)
    assert (outcome.rejected, outcome.good) == (0, 600)


def test_more_requests_are_served_well_than_under_the_papers_policies() -> None:
    requests = asks(800, rate=8.0, spread=0.8)
    good = {
        name: Overload(name, prefill=16, decode=4, profile=MIXED_PROMPTS).run(requests).good
        for name in ("at-decode", "early", "prediction", "perigee")
    }
    assert good["perigee"] > 1.2 * max(good[name] for name in good if name != "perigee"), good
