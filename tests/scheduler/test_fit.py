"""Coefficients found again in measurements that were made from them, with noise and outliers."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from perigee.scheduler.cost import CostProfile
from perigee.scheduler.cost.fit import Fitted, MoveSample, PrefillSample, Samples, StepSample, fit
from perigee.scheduler.cost.hardware import A800_80G
from perigee.scheduler.cost.model_shape import MOONLIGHT_16B_A3B
from perigee.scheduler.cost.roofline import roofline
from perigee.scheduler.errors import InvalidProfile

TRUE = CostProfile(
    prefill_fixed_s=8e-3,
    prefill_token_s=4e-4,
    prefill_pair_s=3e-8,
    load_fixed_s=1.5e-3,
    load_token_s=5e-6,
    transfer_fixed_s=3e-3,
    transfer_token_s=2.5e-5,
    step_fixed_s=1.2e-2,
    step_sequence_s=7e-4,
    step_context_token_s=2e-6,
)
LENGTHS = (32, 128, 512, 2048, 8192, 32768)
PREFIXES = (0, 512, 8192, 65536)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (64, 1024, 8192)


def samples(profile: CostProfile, noise: float = 0.0, slow: float = 0.0, repeats: int = 3) -> Samples:
    """Of a machine that keeps to `profile`, but for `noise` and a share of measurements that take thrice as long."""
    random = np.random.default_rng(0)

    def measured(seconds: float) -> float:
        disturbed = 3.0 if random.random() < slow else 1.0
        return seconds * disturbed * float(np.exp(noise * random.standard_normal()))

    turns = range(repeats)
    return Samples(
        [PrefillSample(n, p, measured(profile.prefill_s(n, p))) for n in LENGTHS for p in PREFIXES for _ in turns],
        [MoveSample(n, measured(profile.load_s(n))) for n in LENGTHS for _ in turns],
        [MoveSample(n, measured(profile.transfer_s(n))) for n in LENGTHS for _ in turns],
        [StepSample(b, b * c, measured(profile.step_s(b, b * c))) for b in BATCHES for c in CONTEXTS for _ in turns],
    )


def assert_near(fitted: Fitted, true: CostProfile, tolerance: float) -> None:
    assert asdict(fitted.profile) == pytest.approx(asdict(true), rel=tolerance)


def test_coefficients_are_found_exactly_where_nothing_disturbs() -> None:
    fitted = fit(samples(TRUE), CostProfile())
    assert_near(fitted, TRUE, 1e-6)
    assert all(residual.p90 < 1e-9 for residual in fitted.residuals.values())


def test_coefficients_are_found_in_noise() -> None:
    fitted = fit(samples(TRUE, noise=0.1, repeats=20), CostProfile())
    assert_near(fitted, TRUE, 0.1)
    assert fitted.residuals["prefill"].p50 == pytest.approx(0.067, abs=0.02)  # half of normal noise is within that
    assert fitted.residuals["prefill"].samples == 20 * len(LENGTHS) * len(PREFIXES)


def test_measurements_that_were_disturbed_hardly_matter() -> None:
    assert_near(fit(samples(TRUE, noise=0.02, slow=0.15, repeats=10), CostProfile()), TRUE, 0.15)


def test_a_coefficient_is_never_negative() -> None:
    falling = [PrefillSample(n, p, 0.1 + 1e-4 * n - 1e-9 * n * p) for n in LENGTHS[:4] for p in PREFIXES]
    profile = fit(replace(samples(TRUE), prefills=falling), CostProfile()).profile
    assert profile.prefill_pair_s == 0.0
    assert profile.prefill_token_s > 0


def test_a_mixture_of_experts_shows_itself() -> None:
    true = roofline(MOONLIGHT_16B_A3B, A800_80G.with_devices(1))
    profile = fit(samples(true, noise=0.02), CostProfile()).profile
    assert profile.step_expert_share == 0.1
    for batch in BATCHES:
        assert profile.step_s(batch, 0) == pytest.approx(true.step_s(batch, 0), rel=0.1)


def test_a_dense_model_is_not_taken_for_a_mixture_of_experts() -> None:
    profile = fit(samples(TRUE, noise=0.1), CostProfile()).profile
    assert (profile.step_experts_s, profile.step_expert_share) == (0.0, 0.0)


def test_what_was_not_measured_is_taken_from_the_base() -> None:
    base = CostProfile(transfer_fixed_s=7.0, transfer_token_s=8.0)
    fitted = fit(replace(samples(TRUE), pulls=[]), base)
    assert (fitted.profile.transfer_fixed_s, fitted.profile.transfer_token_s) == (7.0, 8.0)
    assert "transfer" not in fitted.residuals


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(InvalidProfile, match=r"prefills: there are 2 samples, allowed are 3 and more"):
        fit(replace(samples(TRUE), prefills=samples(TRUE).prefills[:2]), CostProfile())
