"""What attention looks at before any training."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perigee.training import nano
from perigee.training.model import TrainedModel
from perigee.workers.attention import batched
from perigee.workers.attention.batched import mask_of
from perigee.workers.model.moba_config import MobaConfig

LENGTH, PASSAGE = 96, 12


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    model = TrainedModel(nano.SHAPE.config(), "float32", seed=0, mimetic=True)
    model.publish()
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """[sequences, length]. A passage of random tokens comes twice, among others."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, nano.SHAPE.vocab_size, (24, LENGTH), generator=generator)
    tokens[:, 70 : 70 + PASSAGE] = tokens[:, 20 : 20 + PASSAGE]
    return tokens


@pytest.fixture(scope="module")
def looks(model: TrainedModel, tokens: Tensor) -> list[Tensor]:
    """Of each layer, how much each position looks at each: [sequences, heads, length, length]."""
    found: list[Tensor] = []
    attend = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **options: object) -> Tensor:
        scores = (q @ k.mT * scale).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
        found.append(scores.softmax(dim=-1))
        return attend(q, k, v, scale=scale, is_causal=True)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", watched)
        model.decoder(tokens)
    return found


def test_the_first_layers_heads_look_back_each_by_its_distance(looks: list[Tensor]) -> None:
    for head in range(nano.SHAPE.heads):
        diagonal = looks[0][:, head].diagonal(offset=-head - 1, dim1=1, dim2=2)
        assert diagonal[:, 8:].mean() > 0.5


def test_the_last_layer_looks_at_what_followed_a_like_passage(looks: list[Tensor]) -> None:
    end = 70 + PASSAGE - 1
    following = end - 50 + 1
    row = looks[-1][:, ::2, end].mean(dim=(0, 1))
    assert row[:60].argmax() == following
    assert row[following] > 5 / LENGTH


def test_its_other_heads_look_at_what_is_alike(looks: list[Tensor]) -> None:
    end = 70 + PASSAGE - 1
    assert looks[-1][:, 1::2, end, :60].mean(dim=(0, 1)).argmax() == end - 50


def test_the_layers_between_look_everywhere_alike(looks: list[Tensor]) -> None:
    for layer in looks[1:-1]:
        assert layer[:, :, -1].max() < 3 / LENGTH


def test_the_first_layers_gates_choose_the_blocks_just_before(
    model: TrainedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Tensor] = []

    def watched(queries: Tensor, keys: Tensor, moba: MobaConfig) -> Tensor:
        masks.append(mask_of(queries, keys, moba))
        return masks[-1]

    monkeypatch.setattr(batched, "mask_of", watched)
    model.decoder.set_attention(MobaConfig(block_size=16, top_k=3))
    with torch.no_grad():
        model.decoder(tokens)
    seen = masks[0] == 0
    assert seen[:, :, -1, 48:].all() and not seen[:, :, -1, :48].any()
