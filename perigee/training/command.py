"""`perigee train`: one run, or a comparison of many."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from perigee.output import STDOUT, check_writable, publish_json
from perigee.plots.svg import DASHES, Line, Plot, standalone
from perigee.training.comparison import OPTIMIZERS, Comparison, SeedResult, best_lr, step_counts
from perigee.training.config import TrainConfig
from perigee.training.curve import Curve
from perigee.training.export import write_model
from perigee.training.loop import Trainer
from perigee.training.material import Material, built_in, by_flags
from perigee.training.recipe import Recipe
from perigee.workers.model.checkpoint import NANO

logger = logging.getLogger(__name__)

COLORS = {"adamw": "#d1495b", "muon": "#00798c"}

Train = Callable[[Recipe, str], Curve]  # a recipe, and what the progress bar calls it


def run(config: TrainConfig) -> int:
    """Trains, and writes what came out to the output directory. Raises TrainingError."""
    config.output.mkdir(parents=True, exist_ok=True)  # where the file may be meant to go
    check_writable(json=config.json_file)
    if config.threads:
        torch.set_num_threads(config.threads)
    is_nano = config.recipe == NANO and not config.compare
    material = built_in(config.seed) if is_nano else by_flags(config)
    corpus = material.corpus
    logger.info("text read tokens=%d held_out=%d", len(corpus.training), len(corpus.held_out))
    with _progress() as progress:
        results = (_compare if config.compare else _train)(config, material, progress)
    _publish(results, config.json_file)
    return 0


def _train(config: TrainConfig, material: Material, progress: Progress) -> dict[str, Any]:
    recipe, trainer = material.recipe, material.trainer()
    curve = trainer.run(config.output, config.checkpoint_s, _bar(progress, recipe, recipe.optimizer))
    write_model(config.output, material.config, trainer.model.weights, material.tokenizer)
    lines = [
        Line("training", "#999", list(enumerate(curve.training))),
        Line("held out", COLORS[recipe.optimizer], sorted(curve.held_out.items())),
    ]
    _write_plot(config.output, f"{recipe.optimizer}, learning rate {recipe.lr:g}", lines)
    return {"recipe": recipe.as_json(), "final": round(curve.final, 5), **curve.as_json()}


def _compare(config: TrainConfig, material: Material, progress: Progress) -> dict[str, Any]:
    def train(recipe: Recipe, label: str) -> Curve:
        """Or what is on disk already from a comparison that was stopped."""
        file = config.output / "runs" / f"{recipe.digest}.json"
        if file.is_file():
            return Curve.from_json(json.loads(file.read_text())["curve"])
        directory = file.with_suffix("")
        curve = Trainer(recipe, material.corpus).run(directory, config.checkpoint_s, _bar(progress, recipe, label))
        _write_json(file, {"recipe": recipe.as_json(), "curve": curve.as_json()})
        return curve

    comparison = _comparison(config, material.recipe, train)
    _write_plot(config.output, "Held-out loss, Muon and AdamW, tuned alike", list(_lines(comparison)))
    return comparison.as_json()


def _comparison(config: TrainConfig, recipe: Recipe, train: Train) -> Comparison:
    """Tunes both on one grid with a seed of its own, then trains with every seed."""
    tuning: dict[str, dict[float, float]] = {}
    tuned: dict[str, Recipe] = {}
    for name in OPTIMIZERS:
        trial = replace(recipe, optimizer=name, steps=config.tune_steps, seed=max(config.seeds) + 1)
        tuning[name] = {lr: train(replace(trial, lr=lr), f"tune {name} {lr:g}").final for lr in config.lrs}
        tuned[name] = replace(recipe, optimizer=name, lr=best_lr(tuning[name]))
        logger.info("tuned optimizer=%s lr=%g losses=%s", name, tuned[name].lr, tuning[name])
    results = []
    for seed in config.seeds:
        adamw = train(replace(tuned["adamw"], seed=seed), f"adamw, seed {seed}")
        muon = {
            steps: train(replace(tuned["muon"], seed=seed, steps=steps), f"muon, {steps} steps, seed {seed}")
            for steps in step_counts(recipe.steps, config.shares)
        }
        results.append(SeedResult(seed, adamw, muon))
        logger.info("compared seed=%d share=%s adamw=%.4f", seed, results[-1].share, adamw.final)
    return Comparison(recipe, tuning, results)


def _lines(comparison: Comparison) -> Iterator[Line]:
    for result in comparison.seeds:
        yield Line("AdamW", COLORS["adamw"], sorted(result.adamw.held_out.items()))
        for steps, curve in result.muon.items():
            shorter = steps < max(result.muon)
            label = "Muon, shorter schedules" if shorter else "Muon"
            yield Line(label, COLORS["muon"], sorted(curve.held_out.items()), DASHES[1] if shorter else "")


@contextmanager
def _progress() -> Iterator[Progress]:
    """On a terminal; elsewhere it stays silent."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


def _bar(progress: Progress, recipe: Recipe, label: str) -> Callable[[int, float], None]:
    task = progress.add_task(label, total=recipe.steps)
    return lambda step, loss: progress.update(task, completed=step, description=f"{label}: {loss:.3f}")


def _write_plot(output: Path, title: str, lines: list[Line]) -> None:
    plot = Plot(title, "steps", "loss, nats a token", lines)
    (output / "losses.svg").write_text(standalone(plot), encoding="utf-8")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.rename(file)


def _publish(results: dict[str, Any], json_file: str) -> None:
    """As JSON to standard output for `-`; otherwise in a few lines, and to the file if one is named."""
    if json_file != STDOUT:
        shown = {name: results[name] for name in ("tuned_lr", "share", "share_on_curve", "final") if name in results}
        Console().print_json(json.dumps(shown))
    publish_json(results, json_file)
