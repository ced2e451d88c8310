"""The configuration of a store node."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ByteSize, Field, model_validator

from perigee.kvstore.addresses import NEEDS_SECRET, Advertise, DirectoryTarget, DirectoryUser, Listen
from perigee.kvstore.evict import PolicyName


def _no_unix_socket(address: str) -> str:
    if address.startswith("unix:"):
        raise ValueError("allowed is host:port, such as 127.0.0.1:0")
    return address


TransferName = Literal["tcp", "mooncake"]
TransferListen = Annotated[Listen, AfterValidator(_no_unix_socket)]


class StoreConfig(DirectoryUser, frozen=True, extra="forbid"):
    """One store node: one a host, serving every worker there."""

    id: str = Field(default="store-0", min_length=1, description="Name of this store node, unique in the cluster.")
    listen: Listen = Field(
        default="127.0.0.1:0",
        description="Where gRPC listens: host:port (port 0: any free one; beyond loopback needs the cluster's secret)"
        " or unix:/path.",
    )
    advertise: Advertise = Field(default="", description="Host under which others reach this node, if not listen's.")
    socket: Path = Field(description="Unix socket for the workers of this host.")
    directory: DirectoryTarget = Field(
        description="Directory of the cluster's members: a gRPC target, or redis://host:port/0?prefix=NAME."
    )
    dram_bytes: ByteSize = Field(
        default=ByteSize(1 << 30), gt=0, description="Shared memory to keep blocks in, such as 512MiB or 2GiB."
    )
    ssd_folder: Path | None = Field(
        default=None, description="Existing folder, this node's alone, for blocks that leave memory; none: no SSD tier."
    )
    ssd_bytes: ByteSize = Field(
        default=ByteSize(16 << 30), gt=0, description="How much of the disk to reserve there, such as 64GiB."
    )
    ssd_threads: int = Field(default=4, ge=1, le=64, description="Threads that read and write there.")
    ssd_timeout_s: float = Field(
        default=10.0, gt=0, description="Seconds without an answer after which the disk counts as failed."
    )
    transfer: TransferName = Field(
        default="tcp", description="What moves blocks between nodes; mooncake needs the extra of that name."
    )
    transfer_listen: TransferListen = Field(
        default="127.0.0.1:0",
        description="Where other nodes pull blocks: host:port (port 0: any free one; beyond loopback needs the"
        " cluster's secret).",
    )
    transfer_lease_s: float = Field(
        default=30.0, gt=0, description="Seconds that another node may take to read blocks before it is cut off."
    )
    reservation_s: float = Field(
        default=600.0, gt=0, description="Seconds after which a worker may not commit any more what it reserved."
    )
    eviction: PolicyName = Field(
        default="perigee", description="What chooses the blocks that leave memory: lru, s3fifo or our own policy."
    )
    free_share: float = Field(
        default=0.125, ge=0, le=0.5, description="Share of the memory to have free ahead of need where there is an SSD."
    )
    pin_share: float = Field(
        default=0.25, ge=0, le=1, description="Share of the memory that one tenant may pin; all together half of it."
    )

    @model_validator(mode="after")
    def _mooncake_has_secret(self) -> Self:
        """The engine asks nobody who he is: it is for those who have set up a network for the cluster alone."""
        if self.transfer == "mooncake" and not self.cluster_secret:
            raise ValueError(f"--transfer: mooncake {NEEDS_SECRET}")
        return self
