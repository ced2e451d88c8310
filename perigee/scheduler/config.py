"""All that a Conductor can be told."""

from pydantic import BaseModel, Field

from perigee.kvstore.addresses import Listen


class ConductorConfig(BaseModel, frozen=True, extra="forbid"):
    """The Conductor's process, which also hosts the directory of the cluster's members."""

    listen: Listen = Field(
        "127.0.0.1:0", description="Where gRPC listens: host:port on loopback (port 0: any free one) or unix:/path."
    )
    tick_s: float = Field(1.0, gt=0, description="How often the scheduler is told that time has passed, in seconds.")
