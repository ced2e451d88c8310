"""The same models, with gradients: forms of attention and of the kernels that are made for whole batches."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from perigee.kvstore.blocks import DType, PayloadLayout
from perigee.workers.attention.base import TORCH_DTYPES, KVPool, LayerCache, Span, StepBatch
from perigee.workers.attention.batched import BatchedLatentAttention
from perigee.workers.engine.pages import PageTable
from perigee.workers.kernels.trainable import TrainableKernels
from perigee.workers.model.decoder import DecoderLayer, sparse_layer
from perigee.workers.model.layers import Place, Prepared
from perigee.workers.model.mla import MultiHeadLatentAttention
from perigee.workers.model.moba_config import MobaConfig
from perigee.workers.model.moe import MixtureOfExperts, Router
from perigee.workers.model.moonlight_config import MoonlightConfig
from perigee.workers.model.weights import empty_model


class TrainableModel:
    """A decoder whose parameters collect gradients. They are empty until their `places` are filled."""

    def __init__(self, config: MoonlightConfig, dtype: DType) -> None:
        self.config = config
        self.dtype: DType = dtype
        self.decoder = empty_model(config, dtype, TrainableKernels()).requires_grad_(True)
        self.set_attention(config.moba)
        for _, router in self.routers():
            if router.bias is not None:
                router.bias.requires_grad_(False)  # what moves it is how many tokens choose an expert

    def set_attention(self, moba: MobaConfig | None) -> None:
        """From now on, attends as a model with this in its configuration does."""
        config = replace(self.config, moba=moba)
        for index, layer in enumerate(self.decoder.layers):
            assert isinstance(layer.attention, MultiHeadLatentAttention)
            layer.attention.backend = BatchedLatentAttention(config, sparse_layer(config, index))

    def __call__(self, token_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """The logits [sequences, length, vocabulary] after each of `token_ids` [sequences, length], whose `positions`
        are counted from 0 unless they are given. MoBA's blocks are of tokens that lie side by side."""
        for module in self.decoder.modules():
            if isinstance(module, Prepared):
                module.prepare()  # again at each pass: what is laid out anew is a function of the weights
        batch, pool = self._batch(
            torch.arange(token_ids.shape[1]).expand_as(token_ids) if positions is None else positions
        )
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

    def _batch(self, positions: Tensor) -> tuple[StepBatch, KVPool]:
        """Whole sequences, one after the other in a pool that holds nothing else: a page is a sequence."""
        sequences, length = positions.shape
        dtype = TORCH_DTYPES[self.dtype]
        spans = tuple(Span(i * length, length, 0, length, PageTable((i,), length), dtype) for i in range(sequences))
        batch = StepBatch(
            positions.flatten(), torch.arange(sequences * length), spans, None, torch.empty(0, dtype=torch.int64)
        )
        return batch, _PassPool(self.config.payload_layout(self.dtype, length), sequences)


class _PassPool(KVPool):
    """A pool whose layers are tensors of their own: autograd wants none that it saved of one layer to change, and views
    of one tensor count as changed together."""

    def __init__(self, layout: PayloadLayout, num_pages: int) -> None:
        super().__init__(layout, num_pages)
        self.layers = [LayerCache(layer.keys.clone(), None, None) for layer in self.layers]
