"""The processes that a directory tells of."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["store", "worker"]


@dataclass(frozen=True, slots=True)
class Member:
    """A process of the cluster. `incarnation` is new at each start of it, `address` its gRPC target.

    `store` is, of a worker, the id of the store node on its host; `transfer_address`, of a store node, where others
    pull its blocks.
    """

    id: str
    incarnation: str
    kind: Kind
    address: str
    pid: int
    host: str
    store: str = ""
    transfer_address: str = ""
