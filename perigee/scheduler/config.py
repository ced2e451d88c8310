"""All that a Conductor can be told."""

from pydantic import Field

from perigee.kvstore.addresses import DirectoryTarget, DirectoryUser, Listen


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
    tick_s: float = Field(1.0, gt=0, description="How often the scheduler is told that time has passed, in seconds.")
