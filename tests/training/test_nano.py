"""The built-in model is what its recipe says, and the command makes one like it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from perigee.training import command, nano
from perigee.training.config import TrainConfig
from perigee.training.model import TrainedModel
from perigee.training.stage import Stage
from perigee.training.text import digest, documents
from perigee.workers.model.checkpoint import NANO, resolve
from perigee.workers.model.config import load_config
from perigee.workers.model.moba_config import MobaConfig
from perigee.workers.model.tokenizer import Tokenizer

MAX_WEIGHT_BYTES = 30_000_000


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve(NANO, "float32")


def test_the_shipped_configuration_is_the_recipes(directory: Path) -> None:
    assert json.loads((directory / "config.json").read_text()) == nano.nano_config()
    assert load_config(directory).moba == MobaConfig.parse(nano.MOBA)


def test_the_shipped_weights_are_the_recipes_in_bfloat16_and_small(directory: Path) -> None:
    file = directory / "model.safetensors"
    assert file.stat().st_size <= MAX_WEIGHT_BYTES
    expected = TrainedModel(nano.nano_config(), "bfloat16", seed=0).weights
    with safe_open(file, "pt") as tensors:
        assert set(tensors.keys()) == expected.keys()
        for name, weight in expected.items():
            part = tensors.get_slice(name)
            assert tuple(part.get_shape()) == weight.shape
            assert part.get_dtype() == ("F32" if name.endswith("_bias") else "BF16")
    assert 5e6 <= sum(weight.numel() for weight in expected.values()) <= 15e6


def test_the_shipped_tokenizer_has_digits_names_and_a_chat_template(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.vocab_size == nano.SHAPE.vocab_size
    text = "The pass key of amber falcon is 48213."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == 14
    rendered = tokenizer.render_chat([{"role": "user", "content": "Hello"}])
    assert rendered == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
def test_the_shipped_tokenizer_is_made_of_this_pythons_library(directory: Path, tmp_path: Path) -> None:
    texts = documents(None, nano.TEXT_BYTES)
    if digest(texts) != nano.TEXT_DIGEST:
        pytest.skip("another version of Python's library")
    nano.nano_tokenizer(texts).save(str(tmp_path / "tokenizer.json"))
    assert (tmp_path / "tokenizer.json").read_text() == (directory / "tokenizer.json").read_text()


def test_the_card_lies_beside_the_weights(directory: Path) -> None:
    card = (directory / "README.md").read_text()
    assert nano.TEXT_DIGEST in card and "PSF" in card


def test_the_recipe_is_mostly_sparse_and_ends_with_full_attention() -> None:
    recipe = nano.nano_recipe(0, nano.TEXT_DIGEST)
    lengths = [stage.length for stage in recipe.stages]
    assert lengths == sorted(lengths)
    assert any(stage.attention for stage in recipe.stages) and recipe.stages[-1].attention is None
    assert recipe.decay_steps < recipe.steps == sum(stage.steps for stage in recipe.stages)


def test_the_command_makes_the_built_in_model_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command, but for smaller numbers."""
    stages = (Stage(64, 2, 2, "block_size=32,top_k=2", 0.5, 2), Stage(128, 1, 1, "", 1.0, 2))
    monkeypatch.setattr(nano, "STAGES", stages)
    monkeypatch.setattr(nano, "TEXT_BYTES", 300_000)
    monkeypatch.setattr(nano, "_QUESTIONS_IN_VOCABULARY", 500)
    monkeypatch.setattr(nano, "SHAPE", replace(nano.SHAPE, vocab_size=600, width=32, layers=2, experts=4))
    config = TrainConfig(output=tmp_path, checkpoint_s=0, json_file=str(tmp_path / "results.json"))
    assert command.run(config) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["training"]) == 3
    assert load_config(resolve(str(tmp_path), "float32")).moba == MobaConfig.parse(nano.MOBA)
    assert command.run(config) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == results
