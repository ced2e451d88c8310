"""Training runs: the same again, stopped and resumed, through the command, and served."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from perigee.training.checkpoint import load_latest, save
from perigee.training.command import run
from perigee.training.comparison import Comparison, SeedResult, step_counts
from perigee.training.config import TrainConfig
from perigee.training.curve import Curve
from perigee.training.data import Corpus
from perigee.training.errors import TrainingError
from perigee.training.loop import Trainer
from perigee.training.recipe import Recipe, Shape
from perigee.workers.model.checkpoint import resolve
from perigee.workers.model.config import load_config
from perigee.workers.model.tokenizer import Tokenizer
from perigee.workers.model.weights import load_model

SHAPE = Shape(vocab_size=257, width=32, layers=2, heads=2, experts=4, experts_per_token=2, context=16)
RECIPE = Recipe(
    SHAPE,
    optimizer="muon",
    lr=0.01,
    weight_decay=0.1,
    sequences=4,
    steps=12,
    seed=0,
    dtype="float32",
    text_digest="none",
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Tokens that count upwards, which a model learns soon."""
    tokens = torch.arange(20_000) % 50
    return Corpus(tokens, tokens[:2000])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A command that takes seconds."""
    directory = tmp_path_factory.mktemp("text")
    for index in range(40):
        (directory / f"{index}.txt").write_text(f"The sum of {index} and one is {index + 1}. " * 20)
    return TrainConfig(
        recipe="flags",
        output=directory / "out",
        text=directory,
        steps=4,
        tune_steps=2,
        sequences=2,
        vocab_size=300,
        width=32,
        layers=2,
        heads=2,
        experts=4,
        context=16,
        lrs=(0.003, 0.01),
        seeds=(0, 1),
        shares=(0.5, 1.0),
    )


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_model_learns(corpus: Corpus, optimizer: Any, dtype: Any) -> None:
    curve = Trainer(replace(RECIPE, optimizer=optimizer, dtype=dtype, steps=30), corpus).run()
    assert curve.training[0] == pytest.approx(math.log(SHAPE.vocab_size), rel=0.05)
    assert curve.final < 0.7 * curve.training[0]


def test_the_same_recipe_gives_the_same_losses_and_another_seed_others(corpus: Corpus) -> None:
    first, again, other = (Trainer(replace(RECIPE, seed=seed), corpus).run() for seed in (0, 0, 1))
    assert first.as_json() == again.as_json()
    assert first.training != other.training


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(corpus: Corpus, tmp_path: Path, optimizer: Any) -> None:
    recipe = replace(RECIPE, optimizer=optimizer)
    expected = Trainer(recipe, corpus)
    expected.run()
    stopped = Trainer(recipe, corpus)
    for _ in range(5):
        stopped.step()
    save(tmp_path, recipe, stopped.checkpoint())
    resumed = Trainer(recipe, corpus)
    steps: list[int] = []
    resumed.run(tmp_path, checkpoint_s=1e9, progress=lambda step, loss: steps.append(step))
    assert steps == list(range(6, 13))
    assert resumed.curve.training == expected.curve.training
    torch.testing.assert_close(resumed.model.weights, expected.model.weights, rtol=0, atol=0)


def test_a_checkpoint_outlives_one_that_was_cut_short(corpus: Corpus, tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, corpus)
    trainer.step()
    save(tmp_path, RECIPE, trainer.checkpoint())
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    (tmp_path / "checkpoint.partial").mkdir()
    found = load_latest(tmp_path, RECIPE)
    assert found is not None and len(found.curve.training) == 1
    save(tmp_path, RECIPE, trainer.checkpoint())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_of_another_recipe_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    save(tmp_path, RECIPE, Trainer(RECIPE, corpus).checkpoint())
    with pytest.raises(TrainingError, match=r"^output: .* is of another run, .*'lr': 0.01.* allowed is the same one"):
        load_latest(tmp_path, replace(RECIPE, lr=0.02))


def test_the_learning_rate_rises_then_falls_to_a_tenth() -> None:
    recipe = replace(RECIPE, steps=100)
    lrs = [recipe.lr_at(step) for step in range(100)]
    assert lrs[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert lrs[5:] == sorted(lrs[5:], reverse=True)
    assert lrs[-1] == pytest.approx(0.001, rel=0.02)


def test_held_out_documents_are_never_trained_on(small: TrainConfig) -> None:
    tokens = torch.arange(100)
    corpus = Corpus(tokens[:60], tokens[60:])
    drawn = torch.cat([corpus.batch(0, step, 4, 10).flatten() for step in range(50)])
    assert set(drawn.tolist()) == set(range(60))
    assert corpus.measured(3, 10).flatten().min() == 60
    assert corpus.measured(3, 10).shape == (3, 11)


def test_the_command_trains_a_model_that_workers_load(small: TrainConfig, tmp_path: Path) -> None:
    config = small.model_copy(update={"output": tmp_path, "json_file": str(tmp_path / "results.json")})
    assert run(config) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["training"]) == 4
    directory = resolve(str(tmp_path), "float32")
    model = load_model(directory, load_config(directory), "float32")
    assert Tokenizer.load(directory).decode(Tokenizer.load(directory).encode("The sum of")) == "The sum of"
    assert model.embedding.shape == (300, 32)
    ElementTree.parse(tmp_path / "losses.svg")


def test_a_comparison_is_told_in_full_and_made_once(
    small: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small.model_copy(
        update={"output": tmp_path, "compare": "adamw", "json_file": str(tmp_path / "results.json"), "checkpoint_s": 0}
    )
    with caplog.at_level(logging.INFO):
        run(config)
    first = json.loads((tmp_path / "results.json").read_text())
    assert first["tuning"].keys() == {"adamw", "muon"} and first["tuning"]["muon"].keys() == {"0.003", "0.01"}
    assert [seed["seed"] for seed in first["seeds"]] == [0, 1]
    assert all(seed["muon"].keys() == {"2", "4"} for seed in first["seeds"])
    assert len(list((tmp_path / "runs").glob("*.json"))) == 4 + 2 * 3
    assert len(ElementTree.parse(tmp_path / "losses.svg").findall("{*}polyline")) == 6
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run(config)
    assert json.loads((tmp_path / "results.json").read_text()) == first
    assert "checkpoint saved" not in caplog.text


def test_text_that_does_not_suffice_is_named(small: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^text: .* holds no text; read are files that end in"):
        run(small.model_copy(update={"text": tmp_path}))
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(TrainingError, match=r"^text: \d+ tokens of it are trained on, needed are 17 or more"):
        run(small.model_copy(update={"text": tmp_path, "output": tmp_path / "out"}))


def curve(*losses: tuple[int, float]) -> Curve:
    return Curve(held_out=dict(losses))


def test_the_share_is_where_muons_finals_meet_adamws() -> None:
    adamw = curve((50, 4.0), (100, 3.0))
    muon = {40: curve((40, 3.5)), 60: curve((60, 2.5)), 100: curve((60, 4.0), (80, 3.2), (100, 2.2))}
    result = SeedResult(0, adamw, muon)
    assert result.share == pytest.approx(0.5)
    assert result.share_on_curve == pytest.approx(0.84)
    better = SeedResult(0, adamw, {40: curve((40, 2.0))})
    assert better.share == pytest.approx(0.4) and better.share_is_bound and not result.share_is_bound
    worse = SeedResult(0, adamw, {100: curve((100, 3.1))})
    assert worse.share is None and worse.share_on_curve is None
    summary = Comparison(RECIPE, {"muon": {0.1: 3.0, 0.2: 2.0}}, [result, worse]).as_json()
    assert summary["share"] == {"per_seed": [0.5, None], "mean": 0.5, "stdev": None}
    assert summary["tuned_lr"] == {"muon": 0.2}


def test_muons_runs_are_shares_of_adamws_steps() -> None:
    assert list(step_counts(100, (1.0, 0.4, 0.404))) == [40, 100]
