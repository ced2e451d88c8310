"""The forward pass with gradients, against transformers' of the same weights, in float32."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from perigee.training.balance import RATE, Balance
from perigee.training.model import TrainedModel
from tests import tiny_moonlight

VARIANTS: dict[str, dict[str, Any]] = {
    "moonlight": {},
    "query-latent": {"q_lora_rank": 48},
    "groups": {"n_group": 4, "topk_group": 2},
    "one-shared": {"n_shared_experts": 1, "first_k_dense_replace": 0},
    "tied": {"tie_word_embeddings": True},
    "absorbed": {"kv_lora_rank": 16, "v_head_dim": 80},
}


def tokens(sequences: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(2, tiny_moonlight.BASE["vocab_size"], (sequences, length), generator=generator)


def load(directory: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> TrainedModel:
    model = TrainedModel(json.loads((directory / "config.json").read_text()), dtype, seed=0)
    with torch.no_grad():
        for file in directory.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                model.weights[name].copy_(tensor)
    model.publish()
    return model


def gradients(reference: torch.nn.Module) -> dict[str, Tensor]:
    """By the names of a checkpoint. Transformers stacks experts as we do, though their names say otherwise."""
    found: dict[str, Tensor] = {}
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        prefix, _, kind = name.partition(".experts.")
        for expert, gradient in enumerate(parameter.grad if kind else ()):
            of = f"{prefix}.experts.{expert}"
            if kind == "down_proj":
                found[f"{of}.down_proj.weight"] = gradient
            else:
                found[f"{of}.gate_proj.weight"], found[f"{of}.up_proj.weight"] = gradient.chunk(2)
        if not kind:
            found[name] = parameter.grad
    return found


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    tiny_moonlight.write(tmp_path, **changes)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = load(tmp_path)
    batch = tokens(3, 41)
    torch.testing.assert_close(model.decoder(batch), reference(batch).logits, rtol=1e-4, atol=1e-3)
    loss, expected = model.loss(batch), reference(batch, labels=batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    model.collect()
    theirs = gradients(reference)
    assert model.trained.keys() == theirs.keys()
    for name, weight in model.trained.items():
        assert weight.grad is not None
        assert (weight.grad - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


def test_block_sparse_attention_has_the_gradients_of_its_formula(tmp_path: Path) -> None:
    """A top-k of all blocks is full attention, by another way."""
    tiny_moonlight.write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    batch = tokens(2, 50)
    found = []
    for moba in (None, {"block_size": 8, "top_k": 7, "full_layers": 1}):
        model = TrainedModel(config | {"moba": moba}, "float32", seed=0)
        model.publish()
        model.loss(batch).backward()
        model.collect()
        found.append({name: weight.grad for name, weight in model.trained.items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


def test_every_gradient_is_that_of_its_weight_in_bfloat16_too(tmp_path: Path) -> None:
    tiny_moonlight.write(tmp_path)
    batch = tokens(3, 41)
    found = []
    for dtype in ("float32", "bfloat16"):
        model = load(tmp_path, dtype)
        model.loss(batch).backward()
        model.collect()
        found.append(torch.cat([weight.grad.flatten() for weight in model.trained.values()]))
    exact, rounded = found
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=0) > 0.9


def test_gradients_do_not_add_up_over_steps(tmp_path: Path) -> None:
    tiny_moonlight.write(tmp_path)
    model = load(tmp_path)
    batch = tokens(2, 20)
    found = []
    for _ in range(2):
        model.publish()
        model.loss(batch).backward()
        model.collect()
        found.append([weight.grad.clone() for weight in model.trained.values()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_biases_move_against_the_loads_and_forget_them(tmp_path: Path) -> None:
    tiny_moonlight.write(tmp_path)
    model = load(tmp_path)
    balance = Balance(model)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before = model.weights[name].clone()
    chosen: list[Tensor] = []
    _, router = next(model.decoder.routers())
    router.register_forward_hook(lambda module, inputs, output: chosen.append(output[1]))
    model.loss(tokens(2, 20))
    assert balance.imbalance() > 1
    balance.update()
    loads = chosen[0].flatten().bincount(minlength=8)
    expected = RATE * (loads.double().mean() - loads).sign()
    torch.testing.assert_close(model.weights[name] - before, expected.float(), rtol=0, atol=1e-6)
    assert balance.imbalance() == 0
    with torch.no_grad():
        model.loss(tokens(2, 20))
    assert balance.imbalance() == 0
