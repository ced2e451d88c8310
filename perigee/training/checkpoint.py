"""Training's checkpoints: where a run stood, to go on from there."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from perigee.training.curve import Curve
from perigee.training.errors import TrainingError
from perigee.training.recipe import Recipe

logger = logging.getLogger(__name__)

_NAME = "checkpoint"
_OLD = "checkpoint.old"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights by name in float32, the optimizer's state by parameter, and the losses so far, one a step."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[int, Mapping[str, Tensor]]
    curve: Curve


def save(directory: Path, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Replaces the checkpoint in `directory`. Whenever the process may die, a whole one is there."""
    current, old, partial = directory / _NAME, directory / _OLD, directory / "checkpoint.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: weight.detach().contiguous() for name, weight in checkpoint.weights.items()}, partial / "weights")
    flat = {
        f"{index}.{name}": tensor.contiguous()
        for index, state in checkpoint.optimizer.items()
        for name, tensor in state.items()
    }
    save_file(flat, partial / "optimizer")
    content = {"recipe": recipe.as_json(), "curve": checkpoint.curve.as_json()}
    (partial / "run.json").write_text(json.dumps(content))
    for file in partial.iterdir():
        _flush(file)
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        current.rename(old)
    partial.rename(current)
    shutil.rmtree(old, ignore_errors=True)
    logger.info("checkpoint saved directory=%s step=%d", directory, len(checkpoint.curve.training))


def load_latest(directory: Path, recipe: Recipe) -> Checkpoint | None:
    """The checkpoint in `directory`, if there is one. Raises TrainingError if it is of another recipe."""
    found = next((path for path in (directory / _NAME, directory / _OLD) if path.is_dir()), None)
    if found is None:
        return None
    content = json.loads((found / "run.json").read_text())
    if (theirs := Recipe.from_json(content["recipe"])) != recipe:
        raise TrainingError(f"output: {str(found)!r} is of another run, {theirs.as_json()}; allowed is the same one")
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(found / "optimizer").items():
        index, _, kind = name.partition(".")
        optimizer.setdefault(int(index), {})[kind] = tensor
    checkpoint = Checkpoint(load_file(found / "weights"), optimizer, Curve.from_json(content["curve"]))
    logger.info("checkpoint loaded directory=%s step=%d", directory, len(checkpoint.curve.training))
    return checkpoint


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
