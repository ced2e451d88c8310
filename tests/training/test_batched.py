"""Attention and experts in the forms for training, against those that serve, with their gradients, in float32."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perigee.workers.attention.base import LayerCache, Span, StepBatch
from perigee.workers.attention.batched import BatchedLatentAttention
from perigee.workers.attention.latent import LatentAttention, LatentBackend, UpProjection
from perigee.workers.engine.pages import PageTable
from perigee.workers.kernels.base import Chosen, Matrix
from perigee.workers.kernels.reference import TorchKernels
from perigee.workers.kernels.trainable import TrainableKernels
from perigee.workers.model.moba_config import MobaConfig
from perigee.workers.model.moonlight_config import MoonlightConfig
from perigee.workers.model.trainable import TrainableModel
from tests import tiny_moonlight

COUNT, LENGTH, PAGE = 3, 48, 8

ATTENTIONS = {
    "full": None,
    "sparse": MobaConfig(block_size=8, top_k=3),
    "own block alone": MobaConfig(block_size=16, top_k=1),
    "full at first": MobaConfig(block_size=8, top_k=2, min_length=20),
    "more blocks than there are": MobaConfig(block_size=16, top_k=9),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MoonlightConfig:
    directory = tiny_moonlight.write(tmp_path_factory.mktemp("tiny"))
    return MoonlightConfig.from_json(json.loads((directory / "config.json").read_text()))


def step_batch() -> StepBatch:
    """Whole sequences in pages that lie one after the other."""
    pages = LENGTH // PAGE
    tables = [PageTable(tuple(range(i * pages, (i + 1) * pages)), PAGE) for i in range(COUNT)]
    spans = tuple(Span(i * LENGTH, LENGTH, 0, LENGTH, table, torch.float32) for i, table in enumerate(tables))
    return StepBatch(
        torch.arange(LENGTH).repeat(COUNT), torch.arange(COUNT * LENGTH), spans, None, torch.arange(COUNT * pages)
    )


def attended(backend: LatentBackend, config: MoonlightConfig) -> list[Tensor]:
    """What comes out of the same input, and its gradients by queries, latents and the up-projection."""
    generator = torch.Generator().manual_seed(3)
    up = UpProjection(config, TorchKernels())
    with torch.no_grad():
        up.weight.normal_(std=0.3, generator=generator)
    up.prepare()
    rows = COUNT * LENGTH
    q = torch.randn(rows, config.num_heads, config.nope_dim + config.rope_dim, generator=generator)
    latents = torch.randn(rows, config.latent_width, generator=generator)
    leaves = [q.requires_grad_(), latents.requires_grad_(), up.weight]
    cache = LayerCache(latents * 1, None, torch.zeros(rows // PAGE, config.latent_width))
    out = backend.attend(q, cache, up, step_batch())
    out.backward(torch.randn(out.shape, generator=generator))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("moba", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_attention_and_its_gradients_are_those_of_what_serves(config: MoonlightConfig, moba: MobaConfig | None) -> None:
    found = attended(BatchedLatentAttention(config, moba), config)
    expected = attended(LatentAttention(config, TorchKernels(), moba), config)
    assert len(found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def mixed(kernels: TorchKernels, tokens: int) -> list[Tensor]:
    """What experts make of the same tokens, some of whom nobody chose, and all gradients."""
    generator = torch.Generator().manual_seed(5)
    x, gate_up, down, weights = leaves = [
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((tokens, 24), (7, 32, 24), (7, 24, 16), (tokens, 2))
    ]
    experts = torch.rand(tokens, 4, generator=generator).topk(2).indices  # of 6 routed ones, 2 have no token
    out = kernels.experts(x, Chosen(experts, weights, num_shared=1), Matrix(gate_up), Matrix(down))
    out.backward(torch.randn(out.shape, generator=generator))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_experts_and_their_gradients_are_those_of_the_reference(tokens: int) -> None:
    found, expected = mixed(TrainableKernels(), tokens), mixed(TorchKernels(), tokens)
    assert len(found) == 5
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_attention_can_be_changed_and_positions_be_given(tmp_path: Path) -> None:
    content = json.loads((tiny_moonlight.write(tmp_path) / "config.json").read_text())
    model = TrainableModel(MoonlightConfig.from_json(content), "float32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.normal_(std=0.1, generator=generator)
    tokens = torch.randint(2, 100, (2, 40), generator=generator)
    full = model(tokens)
    model.set_attention(MobaConfig(block_size=4, top_k=2))
    assert not torch.allclose(model(tokens), full)
    model.set_attention(None)
    torch.testing.assert_close(model(tokens), full)
    # Rotary positions are relative: what all are moved by changes nothing, a gap does.
    positions = torch.arange(40).expand(2, -1)
    torch.testing.assert_close(model(tokens, positions + 9), full, rtol=1e-3, atol=1e-4)
    gap = positions + 9 * (positions > 20)
    torch.testing.assert_close(model(tokens, gap)[:, :21], full[:, :21])
    assert not torch.allclose(model(tokens, gap)[:, 21:], full[:, 21:])
