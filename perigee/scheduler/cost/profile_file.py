"""A cost profile as a file: YAML, or JSON, which is YAML too."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from perigee.scheduler.cost import CostProfile
from perigee.scheduler.errors import InvalidProfile

Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# Of a model without experts, and a cluster without an SSD tier.
_MAY_BE_ABSENT = {"load_fixed_s", "promote_token_s", "step_experts_s", "step_expert_share"}


class PartError(BaseModel, frozen=True, extra="forbid"):
    """How far the samples of one part are from its fit: |predicted - measured| / measured."""

    samples: int = Field(ge=0)
    p50: float = Field(ge=0, allow_inf_nan=False)
    p90: float = Field(ge=0, allow_inf_nan=False)


class Origin(BaseModel, frozen=True, extra="forbid"):
    """Where a profile comes from. `date` is whatever its maker calls the day; `notes` say what was not measured."""

    method: str  # such as measured, roofline
    model: str = ""
    machine: str = ""
    date: str = ""
    residuals: dict[str, PartError] = {}
    notes: list[str] = []

    def __str__(self) -> str:
        said = (f"{name}={value!r}" for name, value in self if value and isinstance(value, str))
        return " ".join(said)


class ProfileFile(BaseModel, frozen=True, extra="forbid"):
    """What is in the file: the coefficients by their names in CostProfile, and their origin."""

    origin: Origin
    cost: dict[str, Coefficient]

    @classmethod
    def of(cls, profile: CostProfile, origin: Origin) -> "ProfileFile":
        return cls(origin=origin, cost=asdict(profile))

    @property
    def profile(self) -> CostProfile:
        return CostProfile(**self.cost)

    @field_validator("cost")
    @classmethod
    def _complete(cls, cost: dict[str, float]) -> dict[str, float]:
        """The coefficients' defaults are for a process without a file: in one, each is said."""
        names = {field.name for field in fields(CostProfile)}
        if unknown := sorted(cost.keys() - names):
            raise ValueError(f"{unknown[0]}: no such coefficient, allowed are {', '.join(sorted(names))}")
        if missing := sorted(names - cost.keys() - _MAY_BE_ABSENT):
            raise ValueError(f"{missing[0]}: is missing, allowed are seconds, 0 or more")
        if cost.get("step_expert_share", 0.0) > 1:
            raise ValueError(f"step_expert_share: is {cost['step_expert_share']}, allowed is 0 to 1")
        return cost


def read_profile(path: Path) -> ProfileFile:
    """Raises InvalidProfile, with the file, the field, its value and what is allowed."""
    try:
        return ProfileFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InvalidProfile(f"profile: {str(path)!r}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InvalidProfile(f"profile: {str(path)!r}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise InvalidProfile(f"profile: {str(path)!r}: {'; '.join(_problems(error))}") from error


def write_profile(path: Path, profile: ProfileFile) -> None:
    """Raises InvalidProfile if it cannot be written there."""
    try:
        path.write_text(as_yaml(profile), encoding="utf-8")
    except OSError as error:
        raise InvalidProfile(f"profile: {str(path)!r}: {error.strerror}") from error


def as_yaml(profile: ProfileFile) -> str:
    """The file's text. It reads back as exactly the same profile."""
    document = {"origin": profile.origin.model_dump(exclude_defaults=True), "cost": profile.cost}
    return yaml.safe_dump(document, sort_keys=False)


def _problems(error: ValidationError) -> list[str]:
    """One for each field."""
    return [f"{'.'.join(map(str, each['loc']))}: {_said(each)}" for each in error.errors()]


def _said(problem: ErrorDetails) -> str:
    """Our own messages name the value already."""
    reason = problem["msg"].removeprefix("Value error, ")
    return reason if problem["type"] == "value_error" else f"{problem['input']!r}: {reason}"
