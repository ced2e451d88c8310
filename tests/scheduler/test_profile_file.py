"""Profiles as files."""

import json
from pathlib import Path

import pytest

from perigee.scheduler.cost import CostProfile
from perigee.scheduler.cost.hardware import A800_80G
from perigee.scheduler.cost.model_shape import MODELS, ModelShape
from perigee.scheduler.cost.profile_file import Origin, PartError, ProfileFile, as_yaml, read_profile, write_profile
from perigee.scheduler.cost.roofline import roofline
from perigee.scheduler.errors import InvalidProfile

MEASURED = ProfileFile.of(
    CostProfile(prefill_pair_s=1.23456789e-11),
    Origin(
        method="measured",
        model="small",
        machine="two cores",
        date="2026-01-31",
        residuals={"prefill": PartError(samples=12, p50=0.01, p90=0.05)},
        notes=["transfer: not measured"],
    ),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "profile.yaml"


def test_a_profile_reads_back_as_it_was_written(file: Path) -> None:
    write_profile(file, MEASURED)
    assert read_profile(file) == MEASURED
    assert read_profile(file).profile == CostProfile(prefill_pair_s=1.23456789e-11)


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_a_roofline_reads_back_exactly(file: Path, shape: ModelShape) -> None:
    profile = roofline(shape, A800_80G)
    write_profile(file, ProfileFile.of(profile, Origin(method="roofline")))
    assert read_profile(file).profile == profile


def test_a_profile_may_be_json(file: Path) -> None:
    file.write_text(json.dumps(MEASURED.model_dump()))
    assert read_profile(file) == MEASURED


def test_a_model_without_experts_need_not_mention_them(file: Path) -> None:
    lines = as_yaml(MEASURED).splitlines()
    file.write_text("\n".join(line for line in lines if "expert" not in line))
    assert read_profile(file).profile == MEASURED.profile


def test_where_a_profile_comes_from_is_one_line_of_a_log() -> None:
    assert str(MEASURED.origin) == "method='measured' model='small' machine='two cores' date='2026-01-31'"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "prefill_token_s: 0.0005",
            "prefill_token_s: -1",
            r"cost\.prefill_token_s: -1: Input should be greater than or",
        ),
        ("prefill_token_s: 0.0005", "prefill_token_s: fast", r"cost\.prefill_token_s: 'fast': Input should be a valid"),
        ("prefill_token_s: 0.0005", "prefill_token_s: .inf", r"cost\.prefill_token_s: inf: Input should be a finite"),
        ("prefill_token_s: 0.0005", "", r"cost: prefill_token_s: is missing, allowed are seconds, 0 or more"),
        ("prefill_token_s", "prefill_s", r"cost: prefill_s: no such coefficient, allowed are load_fixed_s, load_tok"),
        ("expert_share: 0.0", "expert_share: 1.5", r"cost: step_expert_share: is 1.5, allowed is 0 to 1"),
        ("method: measured", "way: measured", r"origin\.method: .*: Field required; origin\.way: .*not permitted"),
        ("origin:", "origin: [", r"while parsing"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(file: Path, old: str, new: str, problem: str) -> None:
    file.write_text(as_yaml(MEASURED).replace(old, new))
    with pytest.raises(InvalidProfile, match=problem) as caught:
        read_profile(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_is_named(file: Path) -> None:
    with pytest.raises(InvalidProfile, match=r"profile: '.*profile\.yaml': No such file or directory"):
        read_profile(file)
    with pytest.raises(InvalidProfile, match=r"profile: '.*profile\.yaml': No such file or directory"):
        write_profile(file.parent / "missing" / "profile.yaml", MEASURED)
