"""What the routes work with: one object for each thing that this process owns."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from perigee.scheduler import scheduler_pb2 as pb
from perigee.server.closing import Closing
from perigee.server.cluster_metrics import ClusterCollector
from perigee.server.conductor_client import ConductorClient
from perigee.server.config import ServerConfig
from perigee.server.dispatch import Dispatcher
from perigee.server.errors import ModelNotFound, Unavailable
from perigee.server.metrics import Metrics
from perigee.server.tenants import Tenants
from perigee.server.worker_pool import WorkerPool
from perigee.workers.messages import ModelCard
from perigee.workers.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Gateway:
    """`tokenizer_digest` is of this server's tokenizer files, empty to take any worker's word."""

    config: ServerConfig
    tokenizer: Tokenizer
    tokenizer_digest: str
    tenants: Tenants
    conductor: ConductorClient
    dispatcher: Dispatcher
    metrics: Metrics
    closing: Closing

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, config: ServerConfig, tokenizer: Tokenizer, tokenizer_digest: str = ""
    ) -> AsyncIterator["Gateway"]:
        """Connected to the cluster, as far as it is there, until the context is left. Raises KeysFileError."""
        tenants = Tenants.load(config.api_keys_file, config.slos)
        async with (
            ConductorClient.connected(config.conductor, config.cluster_poll_s, config.access) as conductor,
            WorkerPool.opened(config.access) as workers,
        ):
            metrics = Metrics()
            metrics.registry.register(ClusterCollector(lambda: conductor.state))
            dispatcher = Dispatcher(conductor, workers, metrics, config)
            yield cls(config, tokenizer, tokenizer_digest, tenants, conductor, dispatcher, metrics, Closing())

    def model_name(self, card: ModelCard) -> str:
        return self.config.served_model_name or card.name

    def card(self) -> ModelCard:
        """What the cluster serves. Raises Unavailable if that is not known or is for another tokenizer."""
        card = self.conductor.card
        if card is None:
            raise Unavailable("no worker has said yet which model it serves")
        if self._disagrees(card):
            raise Unavailable("the workers have another tokenizer than this server")
        return card

    def card_for(self, model: str) -> ModelCard:
        """The same for a request that names its model. Raises ModelNotFound as well."""
        card = self.card()
        if model != self.model_name(card):
            raise ModelNotFound(f"model: {model!r} is not served; allowed is {self.model_name(card)!r}", param="model")
        return card

    def missing(self, state: pb.ClusterState | None) -> list[str]:
        """What keeps this server from answering, empty if nothing does."""
        if not self.conductor.reachable or state is None:
            return ["conductor"]
        roles = {worker.report.role for worker in state.workers if not worker.report.draining}
        missing = [f"{phase} worker" for phase in ("prefill", "decode") if not roles & {phase, "mixed"}]
        if not missing and not state.ready:
            missing.append("cluster")
        if self.conductor.card is not None and self._disagrees(self.conductor.card):
            missing.append("workers with this server's tokenizer")
        return missing

    def _disagrees(self, card: ModelCard) -> bool:
        return bool(self.tokenizer_digest) and card.tokenizer_digest != self.tokenizer_digest
