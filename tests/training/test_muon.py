"""Muon against its formula written out, and what every torch optimizer does."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from perigee.training.errors import TrainingError
from perigee.training.muon import Muon, parameter_groups
from perigee.training.rules import UPDATE_RMS, muon_updates

LR, DECAY, MOMENTUM = 0.02, 0.1, 0.95


def gradients(parameter: Tensor, steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(parameter.shape, generator=generator) for _ in range(steps)]


def train(optimizer: Muon, parameters: list[nn.Parameter], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for index, parameter in enumerate(parameters):
            parameter.grad = gradients(parameter, step + 1, index)[-1]
        optimizer.step()


def reference_muon(weight: Tensor, grads: list[Tensor]) -> Tensor:
    """Section 2 of the paper, line by line, for one matrix in float64."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in grads:
        momentum = MOMENTUM * momentum + gradient.double()
        x = MOMENTUM * momentum + gradient.double()
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
        weight = weight - LR * (0.2 * max(weight.shape) ** 0.5 * x + DECAY * weight)
    return weight


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_equals_the_papers_formula(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape))
    expected = reference_muon(parameter.detach().clone(), gradients(parameter, 6))
    optimizer = Muon([parameter], lr=LR, weight_decay=DECAY, momentum=MOMENTUM, dtype=torch.float32)
    train(optimizer, [parameter], 6)
    torch.testing.assert_close(parameter.detach(), expected.float(), rtol=1e-5, atol=1e-5)


def test_vectors_and_tables_move_as_torchs_adamw_moves_them() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((30, 8), (8,))]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "betas": (0.9, 0.95), "eps": 1e-8}
    train(Muon([{"params": ours, "kind": "adamw"}], **options), ours, 6)
    train(torch.optim.AdamW(theirs, **options), theirs, 6)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


sides = st.integers(8, 96)


@settings(max_examples=60)
@given(rows=sides, columns=sides, scale=st.floats(-12, 6), seed=st.integers(0, 2**31))
def test_an_updates_rms_is_near_adamws_for_any_shape(rows: int, columns: int, scale: float, seed: int) -> None:
    direction = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**scale
    (update,) = muon_updates([direction], torch.float32)
    # The worst are nearly square matrices, some of whose singular values are too small to be lifted all the way.
    assert 0.6 * UPDATE_RMS < update.square().mean().sqrt() < 1.25 * UPDATE_RMS


def test_each_expert_moves_as_if_it_were_alone() -> None:
    torch.manual_seed(0)
    stacked = nn.Parameter(torch.randn(5, 12, 20))
    alone = [nn.Parameter(expert.clone()) for expert in stacked.detach()]
    many, single = Muon([stacked], lr=LR, dtype=torch.float32), Muon(alone, lr=LR, dtype=torch.float32)
    for gradient in gradients(stacked, 4):
        stacked.grad = gradient
        for expert, own in zip(alone, gradient, strict=True):
            expert.grad = own
        many.step()
        single.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([expert.detach() for expert in alone]))


def test_one_experts_gradient_moves_no_other_expert() -> None:
    torch.manual_seed(0)
    before = torch.randn(3, 12, 20)
    parameter = nn.Parameter(before.clone())
    parameter.grad = torch.zeros_like(before)
    parameter.grad[1] = torch.randn(12, 20)
    Muon([parameter], lr=LR, weight_decay=0).step()
    moved = (parameter.detach() != before).flatten(1).any(dim=1)
    assert moved.tolist() == [False, True, False]


def test_matrices_of_one_shape_or_its_transpose_do_not_mix() -> None:
    torch.manual_seed(0)
    directions = [torch.randn(shape) for shape in ((12, 20), (20, 12), (3, 12, 20), (8, 8), (20, 12))]
    together = muon_updates(directions, torch.float32)
    apart = [muon_updates([direction], torch.float32)[0] for direction in directions]
    assert [update.shape for update in together] == [direction.shape for direction in directions]
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_from_a_state_dict_as_if_it_had_never_stopped(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((12, 20), (4, 8, 12), (20,))]
    named = list(zip(("a", "b", "c"), parameters, strict=True))
    optimizer = Muon(parameter_groups(named), lr=LR, dtype=dtype)
    train(optimizer, parameters, 3)
    resumed = copy.deepcopy(parameters)
    again = Muon(parameter_groups(zip("abc", resumed, strict=True)), lr=1.0, dtype=dtype)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, parameters, 3, first=3)
    train(again, resumed, 3, first=3)
    torch.testing.assert_close(resumed, parameters, rtol=0, atol=0)


def test_parameters_are_grouped_by_what_they_are() -> None:
    shapes = {
        "model.embed_tokens.weight": (30, 8),
        "model.layers.0.mlp.experts.0.up_proj.weight": (8, 8),
        "model.layers.0.input_layernorm.weight": (8,),
        "lm_head.weight": (30, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
    }
    named = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    names = {parameter: name for name, parameter in named.items()}
    matrices, rest = parameter_groups(named.items())
    assert (matrices["kind"], rest["kind"]) == ("muon", "adamw")
    assert [names[p] for p in matrices["params"]] == [name for name in shapes if "_proj" in name]
    assert [names[p] for p in rest["params"]] == [name for name in shapes if "_proj" not in name]


def test_a_parameter_without_gradient_stays_as_it_is() -> None:
    parameters = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))]
    parameters[0].grad = torch.randn(4, 4)
    Muon(parameters, lr=LR).step()
    assert torch.equal(parameters[1].detach(), torch.ones(4, 4))


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned() -> None:
    parameter = nn.Parameter(torch.eye(4))

    def closure() -> float:
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert Muon([parameter]).step(closure) == 4.0
    assert not torch.equal(parameter.detach(), torch.eye(4))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lr": -1.0}, "lr: -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay: nan"),
        ({"momentum": 1.0}, "momentum: 1.0"),
        ({"betas": (0.9, -0.1)}, "betas: -0.1"),
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(TrainingError, match=f"^{field} given, allowed is"):
        Muon([nn.Parameter(torch.zeros(2, 2))], **options)


def test_a_vector_or_an_unknown_kind_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"^params: one of shape \[3\] in a group of kind 'muon'"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(TrainingError, match=r"^kind: 'sgd' given, allowed are muon, adamw"):
        Muon([{"params": [nn.Parameter(torch.zeros(3, 3))], "kind": "sgd"}])
