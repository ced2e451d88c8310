"""The configuration of a store node."""

from pathlib import Path

from pydantic import BaseModel, ByteSize, Field

from perigee.kvstore.addresses import Listen


class StoreConfig(BaseModel, frozen=True, extra="forbid"):
    """One store node: one a host, serving every worker there."""

    id: str = Field(default="store-0", min_length=1, description="Name of this store node, unique in the cluster.")
    listen: Listen = Field(
        default="127.0.0.1:0",
        description="Where gRPC listens: host:port on loopback (port 0: any free one) or unix:/path.",
    )
    socket: Path = Field(description="Unix socket for the workers of this host.")
    directory: str = Field(min_length=1, description="gRPC target of the directory of the cluster's members.")
    dram_bytes: ByteSize = Field(
        default=ByteSize(1 << 30), gt=0, description="Shared memory to keep blocks in, such as 512MiB or 2GiB."
    )
