"""The cluster to be measured, as its server tells of it."""

from dataclasses import dataclass

import aiohttp
from pydantic import BaseModel, ValidationError

from perigee.kvstore.blocks import BlockKey
from perigee.profiling.errors import ProfilingError

_TIMEOUT = aiohttp.ClientTimeout(total=10.0)


class Card(BaseModel, frozen=True):
    """What all workers serve."""

    name: str
    namespace: str
    block_tokens: int
    max_context: int
    vocab_size: int

    @property
    def root(self) -> BlockKey:
        """Of the block keys."""
        return BlockKey(bytes.fromhex(self.namespace))


class Load(BaseModel, frozen=True):
    """What a worker carries, and what it could."""

    queued_sequences: int
    running_sequences: int
    total_pages: int
    max_sequences: int


class Worker(BaseModel, frozen=True):
    """A worker and where it is reached. `store` is its store node's id."""

    id: str
    host: str
    pid: int
    address: str
    role: str
    store: str
    load: Load

    @property
    def prefills(self) -> bool:
        return self.role in ("prefill", "mixed")

    @property
    def decodes(self) -> bool:
        return self.role in ("decode", "mixed")


class Arena(BaseModel, frozen=True):
    """The memory of a store node."""

    num_slots: int


class Store(BaseModel, frozen=True):
    """A store node."""

    id: str
    load: Arena


class Cluster(BaseModel, frozen=True):
    """The answer of GET /cluster, as far as it matters here."""

    ready: bool
    model: Card
    workers: list[Worker]
    stores: list[Store]


@dataclass(frozen=True, slots=True)
class Target:
    """Whose API is asked, and with which key if it wants one."""

    url: str
    api_key: str = ""


async def fetch(target: Target) -> Cluster:
    """Raises ProfilingError if there is no answer, or the cluster is not ready or not idle."""
    url = f"{target.url}/cluster"
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    try:
        async with (
            aiohttp.ClientSession(timeout=_TIMEOUT, raise_for_status=True) as session,
            session.get(url, headers=headers) as response,
        ):
            cluster = Cluster.model_validate_json(await response.read())
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ProfilingError(f"url: no answer from {url}: {str(error) or type(error).__name__}") from error
    except ValidationError as error:
        raise ProfilingError(f"url: {url} does not describe a cluster: {error.errors()[0]['loc']}") from error
    _check(cluster)
    return cluster


def _check(cluster: Cluster) -> None:
    if not cluster.ready:
        raise ProfilingError("ready: is false, allowed are clusters with a worker for each phase")
    for worker in cluster.workers:
        if busy := worker.load.running_sequences + worker.load.queued_sequences:
            raise ProfilingError(f"worker {worker.id}: has {busy} sequences, allowed are idle workers")
