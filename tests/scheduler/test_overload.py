"""What admission policies make of more than a cluster can take, in virtual time."""

from dataclasses import replace

import numpy as np
import pytest

from tests.scheduler.overload import PROFILE, Ask, Outcome, Overload

pytestmark = pytest.mark.slow

# Each prompt takes about ten seconds to compute, on one of very many workers: the lag between admission and load.
SLOW_PROMPTS = replace(PROFILE, prefill_token_s=8e-4, prefill_pair_s=0.0, step_context_token_s=2.5e-7)
# Prompts of very different lengths, and prefill is not for nothing.
MIXED_PROMPTS = replace(PROFILE, prefill_token_s=1e-4, step_context_token_s=2.5e-7)


def asks(count: int, rate: float, spread: float) -> list[Ask]:
    """Poisson arrivals; prompts around 12,000 tokens, answers around 350."""
    random = np.random.default_rng(1)
    at = np.cumsum(random.exponential(1 / rate, count))
    prompts = np.clip(random.lognormal(np.log(12_000) - spread**2 / 2, spread, count), 500, 100_000).astype(int)
    answers = np.clip(random.lognormal(np.log(350) - 0.5, 1.0, count), 2, 2000).astype(int)
    return [Ask(float(a), int(p), int(o)) for a, p, o in zip(at, prompts, answers, strict=True)]


def band(outcome: Outcome, begin: int, end: int) -> float:
    """Between which loads the decode pool is nine tenths of the time."""
    low, high = np.percentile(outcome.load[begin:end], [5, 95])
    return float(high - low)


@pytest.fixture(scope="module")
def lagging() -> dict[str, Outcome]:
    requests = asks(1000, rate=3.5, spread=0.0)
    policies = ("at-decode", "early", "perigee")
    return {name: Overload(name, prefill=64, decode=4, profile=SLOW_PROMPTS).run(requests) for name in policies}


def test_the_load_swings_less_under_a_forecast_than_under_todays_load(lagging: dict[str, Outcome]) -> None:
    assert band(lagging["perigee"], 100, 285) < band(lagging["early"], 100, 285)


def test_the_more_is_foreseen_the_less_is_computed_in_vain(lagging: dict[str, Outcome]) -> None:
    in_vain = [lagging[name].rejected_late for name in ("at-decode", "early", "perigee")]
    assert in_vain[0] > 2 * in_vain[1]
    assert in_vain[1] > 1.5 * in_vain[2]


def test_what_is_let_in_keeps_its_promise(lagging: dict[str, Outcome]) -> None:
    outcome = lagging["perigee"]
    assert outcome.good >= 0.95 * outcome.finished


def test_more_requests_are_served_well_than_under_the_papers_policies() -> None:
    requests = asks(600, rate=6.0, spread=0.8)
    good = {
        name: Overload(name, profile=MIXED_PROMPTS).run(requests).good
        for name in ("at-decode", "early", "prediction", "perigee")
    }
    assert good["perigee"] == max(good.values()), good
