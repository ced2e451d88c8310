"""Distributed Muon in real processes, against Muon in one; bytes that go between them, and what each keeps."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from perigee.training.distributed import DistributedMuon
from perigee.training.muon import Kind, Muon, parameter_groups
from tests.training.processes import Processes, started

# Sizes of which none is a multiple of another, so that cuts go through matrices, experts and vectors.
SHAPES = {
    "embed_tokens.weight": (37, 12),
    "q_proj.weight": (20, 12),
    "o_proj.weight": (12, 20),
    "experts.weight": (5, 12, 28),
    "norm.weight": (13,),
    "down_proj.weight": (12, 28),
}
STEPS = 4
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}


def parameters(shapes: dict[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def gradient(shape: torch.Size, step: int, share: int, index: int) -> Tensor:
    """Of one of the four shares into which a step's batch is cut, however many processes there are."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + 10 * index + share))


def set_gradients(named: dict[str, nn.Parameter], step: int, shares: range) -> None:
    for index, parameter in enumerate(named.values()):
        parameter.grad = torch.stack([gradient(parameter.shape, step, share, index) for share in shares]).mean(dim=0)


def train(named: dict[str, nn.Parameter], optimizer: Muon, steps: range, shares: range) -> None:
    for step in steps:
        set_gradients(named, step, shares)
        optimizer.step()


def single(dtype: torch.dtype, steps: int = STEPS) -> tuple[list[Tensor], dict[str, Any]]:
    named = parameters(SHAPES)
    optimizer = Muon(parameter_groups(named.items()), dtype=dtype, **OPTIONS)
    train(named, optimizer, range(steps), range(4))
    return [parameter.detach() for parameter in named.values()], optimizer.state_dict()


def distributed(
    group: dist.ProcessGroup,
    shapes: dict[str, tuple[int, ...]],
    matrices: Kind,
    dtype: torch.dtype,
    resumed: tuple[list[Tensor], dict[str, Any]] | None,
    steps: range,
) -> dict[str, Any]:
    named = parameters(shapes)
    groups = parameter_groups(named.items(), matrices)
    optimizer = DistributedMuon(groups, process_group=group, dtype=dtype, **OPTIONS)
    if resumed:
        for parameter, weights in zip(named.values(), resumed[0], strict=True):
            parameter.data.copy_(weights)
        optimizer.load_state_dict(resumed[1])
    share = 4 // group.size()
    train(named, optimizer, steps, range(group.rank() * share, (group.rank() + 1) * share))
    sent = dict(optimizer.exchange.sent_bytes)
    weights = [parameter.detach() for parameter in named.values()]
    return {"weights": weights, "state": optimizer.state_dict(), "state_bytes": optimizer.state_bytes, "sent": sent}


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with started(4) as running:
        yield running


def run(
    processes: Processes,
    number: int,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    matrices: Kind = "muon",
    dtype: torch.dtype = torch.float32,
    resumed: tuple[list[Tensor], dict[str, Any]] | None = None,
    steps: range = range(STEPS),
) -> list[dict[str, Any]]:
    return processes.run(number, distributed, shapes, matrices, dtype, resumed, steps)


@pytest.mark.parametrize("number", [2, 4])
def test_weights_equal_those_of_one_process(processes: Processes, number: int) -> None:
    expected, state = single(torch.float32)
    for outcome in run(processes, number):
        torch.testing.assert_close(outcome["weights"], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outcome["state"]["state"], state["state"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [2, 4])
def test_training_goes_on_with_another_number_of_processes(processes: Processes, number: int) -> None:
    expected, _ = single(torch.float32, steps=2 * STEPS)
    before = run(processes, 6 - number)[0]
    for outcome in run(processes, number, resumed=(before["weights"], before["state"]), steps=range(STEPS, 2 * STEPS)):
        torch.testing.assert_close(outcome["weights"], expected, rtol=1e-5, atol=1e-6)


def test_training_goes_on_in_one_process_and_from_one(processes: Processes) -> None:
    expected, _ = single(torch.float32, steps=2 * STEPS)
    shared = run(processes, 2, resumed=single(torch.float32), steps=range(STEPS, 2 * STEPS))[0]
    torch.testing.assert_close(shared["weights"], expected, rtol=1e-5, atol=1e-6)
    before = run(processes, 2)[0]
    named = parameters(SHAPES)
    optimizer = Muon(parameter_groups(named.items()), dtype=torch.float32, **OPTIONS)
    for parameter, weights in zip(named.values(), before["weights"], strict=True):
        parameter.data.copy_(weights)
    optimizer.load_state_dict(before["state"])
    train(named, optimizer, range(STEPS, 2 * STEPS), range(4))
    torch.testing.assert_close([p.detach() for p in named.values()], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [2, 4])
def test_muon_sends_at_most_a_quarter_more_than_adamw_and_keeps_half(processes: Processes, number: int) -> None:
    """Section 2.3: gathers of bfloat16 matrices come on top of float32 gradients and weights; one buffer of two goes.

    All weights here are matrices that every process needs, so that the bound itself is reached.
    """
    shapes = {"q_proj.weight": (48, 40)}
    muon = run(processes, number, shapes, dtype=torch.bfloat16)
    adamw = run(processes, number, shapes, "adamw")
    for ours, theirs in zip(muon, adamw, strict=True):
        assert sum(ours["sent"].values()) == 1.25 * sum(theirs["sent"].values())
        assert ours["sent"]["matrices"] * 2 == ours["sent"]["gradients"] == ours["sent"]["weights"]
        assert ours["state_bytes"] * 2 == theirs["state_bytes"] == 2 * 4 * 48 * 40 // number


def test_only_matrices_that_a_cut_goes_through_are_gathered(processes: Processes) -> None:
    outcomes = run(processes, 4, dtype=torch.bfloat16), run(processes, 4, matrices="adamw")
    muon, adamw = (sum(sum(outcome["sent"].values()) for outcome in outcome) for outcome in outcomes)
    assert 1 < muon / adamw < 1.1
    # What all send is each weight's gradient to its owner, and the weight to all others.
    elements = sum(parameter.numel() for parameter in parameters(SHAPES).values())
    assert adamw == STEPS * 2 * 3 * 4 * elements


def test_state_is_spread_evenly(processes: Processes) -> None:
    _, whole = single(torch.float32)
    buffers = [buffer for state in whole["state"].values() for name, buffer in state.items() if name != "step"]
    outcomes = run(processes, 4)
    assert sum(outcome["state_bytes"] for outcome in outcomes) == sum(buffer.nbytes for buffer in buffers)
    sizes = [outcome["state_bytes"] for outcome in outcomes]
    assert max(sizes) - min(sizes) <= 2 * 3 * 3 * 4


def test_more_processes_than_weights(processes: Processes) -> None:
    shapes = {"q_proj.weight": (1, 3), "norm.weight": (2,)}
    first, *others = run(processes, 4, shapes)
    for outcome in others:
        torch.testing.assert_close(outcome["weights"], first["weights"], rtol=0, atol=0)
