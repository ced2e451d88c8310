"""The same models, with gradients: torch's kernels, and a cache for one pass alone."""

from collections.abc import Iterator

import torch
from torch import Tensor

from perigee.kvstore.blocks import DType, PayloadLayout, num_blocks
from perigee.workers.attention.base import KVPool, LayerCache, Span, StepBatch
from perigee.workers.engine.pages import PageTable
from perigee.workers.kernels.reference import TorchKernels
from perigee.workers.model.config import ModelConfig
from perigee.workers.model.decoder import DecoderLayer
from perigee.workers.model.layers import Place, Prepared
from perigee.workers.model.moe import MixtureOfExperts, Router
from perigee.workers.model.weights import empty_model


class TrainableModel:
    """A decoder whose parameters collect gradients. They are empty until their `places` are filled."""

    def __init__(self, config: ModelConfig, dtype: DType) -> None:
        self.config = config
        self.dtype: DType = dtype
        self.decoder = empty_model(config, dtype, TorchKernels()).requires_grad_(True)
        for _, router in self.routers():
            if router.bias is not None:
                router.bias.requires_grad_(False)  # what moves it is how many tokens choose an expert

    def __call__(self, token_ids: Tensor) -> Tensor:
        """The logits [sequences, length, vocabulary] after each of `token_ids` [sequences, length]."""
        for module in self.decoder.modules():
            if isinstance(module, Prepared):
                module.prepare()  # again at each pass: what is laid out anew is a function of the weights
        batch, pool = self._batch(*token_ids.shape)
        hidden = self.decoder(token_ids.flatten(), batch, pool)
        return self.decoder.logits(hidden).view(*token_ids.shape, -1)

    def places(self) -> dict[str, tuple[Place, Tensor]]:
        """Each tensor of a Hugging Face checkpoint: its place, and the parameter which that is in."""
        owners = {parameter.untyped_storage().data_ptr(): parameter for parameter in self.decoder.parameters()}
        with torch.no_grad():
            return {
                name: (place, owners[place.view.untyped_storage().data_ptr()]) for name, place in self.decoder.places()
            }

    def routers(self) -> Iterator[tuple[int, Router]]:
        """The routers, and their layers' indices."""
        for index, layer in enumerate(self.decoder.layers):
            assert isinstance(layer, DecoderLayer)
            if isinstance(layer.mlp, MixtureOfExperts):
                yield index, layer.mlp.router

    def _batch(self, sequences: int, length: int) -> tuple[StepBatch, KVPool]:
        """Whole sequences, one after the other in a pool that holds nothing else."""
        moba = self.config.moba
        page_tokens = moba.block_size if moba else length
        pages = num_blocks(length, page_tokens)
        tables = [PageTable(tuple(range(i * pages, (i + 1) * pages)), page_tokens) for i in range(sequences)]
        pool = _PassPool(self.config.payload_layout(self.dtype, page_tokens), sequences * pages, moba is not None)
        spans = tuple(_span(table, index * length, length, pool) for index, table in enumerate(tables))
        rows = torch.tensor([row for table in tables for row in table.rows(0, length)])
        full = torch.tensor([page for table in tables for page in table.pages[: length // page_tokens]])
        return StepBatch(torch.arange(length).repeat(sequences), rows, spans, None, full), pool


class _PassPool(KVPool):
    """A pool whose layers are tensors of their own: autograd wants none that it saved of one layer to change, and views
    of one tensor count as changed together."""

    def __init__(self, layout: PayloadLayout, num_pages: int, with_centroids: bool) -> None:
        super().__init__(layout, num_pages, with_centroids=with_centroids)
        self.layers = list(map(_own, self.layers))


def _own(layer: LayerCache) -> LayerCache:
    values, centroids = (None if part is None else part.clone() for part in (layer.values, layer.centroids))
    return LayerCache(layer.keys.clone(), values, centroids)


def _span(pages: PageTable, first: int, length: int, pool: KVPool) -> Span:
    return Span(first, length, 0, length, pages, pool.tensor.dtype)
