"""All that a Conductor can be told."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ByteSize, Field

from perigee.kvstore.addresses import DirectoryTarget, DirectoryUser, Listen
from perigee.scheduler.balance.roles import DEFAULT_HOLD_S
from perigee.scheduler.fairness import parse_weights
from perigee.scheduler.policies import ADMISSIONS, BALANCES, PLACEMENTS, PolicyNames, parse_policies
from perigee.scheduler.receipts import DEFAULT_LIMIT


def _known(name: str, allowed: Collection[str]) -> str:
    if name not in allowed:
        raise ValueError(f"allowed are {', '.join(sorted(allowed))}")
    return name


PlacementName = Annotated[str, AfterValidator(lambda name: _known(name, PLACEMENTS))]
AdmissionName = Annotated[str, AfterValidator(lambda name: _known(name, ADMISSIONS))]
BalanceName = Annotated[str, AfterValidator(lambda name: _known(name, BALANCES))]


def _checked_shadow(text: str) -> str:
    parse_policies(text)
    return text


Shadow = Annotated[str, AfterValidator(_checked_shadow)]
"""Policies that are asked and not obeyed, as `parse_policies` reads them."""


def _checked_weights(parts: tuple[str, ...]) -> tuple[str, ...]:
    parse_weights(parts)
    return parts


TenantWeights = Annotated[tuple[str, ...], AfterValidator(_checked_weights)]
"""NAME=WEIGHT for each tenant that has another weight than 1, as `parse_weights` reads them."""


class ConductorConfig(DirectoryUser, frozen=True, extra="forbid"):
    """The Conductor's process. Unless the directory of the cluster's members is in Redis, it hosts that, too."""

    listen: Listen = Field(
        "127.0.0.1:0",
        description="Where gRPC listens: host:port (port 0: any free one; beyond loopback needs the cluster's secret)"
        " or unix:/path.",
    )
    directory: DirectoryTarget | None = Field(
        None, description="Directory of the cluster's members, such as redis://host:port/0; without it: here."
    )
    profile: Path | None = Field(
        None,
        description="Cost model, as `perigee profile` writes it; without it: rough figures of a small model on a CPU.",
    )
    tick_s: float = Field(1.0, gt=0, description="How often the scheduler is told that time has passed, in seconds.")
    placement: PlacementName = Field(
        "perigee", description=f"Policy that chooses the workers of a request: {', '.join(PLACEMENTS)}."
    )
    admission: AdmissionName = Field(
        "perigee", description=f"Policy that decides which requests are served: {', '.join(ADMISSIONS)}."
    )
    balance: BalanceName = Field(
        "roles",
        description="Policy that copies blocks and moves workers between the pools, while nobody asks for it: "
        f"{', '.join(BALANCES)}.",
    )
    role_hold_s: float = Field(
        DEFAULT_HOLD_S,
        gt=0,
        description="How long one pool must need a worker of the other before it gets it, in seconds.",
    )
    tenant_weights: TenantWeights = Field(
        (),
        description="What tenants count for where they compete, such as gold=4,free=0.5; all others count 1. A tenant's"
        " fair share is its weight over that of all tenants that want some.",
    )
    shadow: Shadow | None = Field(
        None, description="Policies to ask as well, without obeying them, such as placement=random,admission=early."
    )
    receipts: int = Field(DEFAULT_LIMIT, ge=1, description="Of how many requests that ended receipts are kept.")
    receipts_file: Path | None = Field(None, description="File for the receipt of each request, a JSON line each.")
    record: Path | None = Field(
        None, description="File to record all that the scheduler hears and says in, for `perigee replay-log`."
    )
    record_bytes: ByteSize = Field(ByteSize(1 << 30), gt=0, description="How large that may become, such as 512MiB.")

    @property
    def policies(self) -> PolicyNames:
        return PolicyNames(self.placement, self.admission, self.balance)

    @property
    def weights(self) -> dict[str, float]:
        """Of the tenants that have another one than 1."""
        return parse_weights(self.tenant_weights)
