"""Fills a model from safetensors, tensor by tensor, straight into the place where each belongs."""

import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from perigee.kvstore.blocks import DType
from perigee.workers.attention.base import TORCH_DTYPES
from perigee.workers.model.config import ModelConfig
from perigee.workers.model.errors import UnsupportedModel
from perigee.workers.model.llama import Llama

Model = Llama


def load_model(directory: Path, config: ModelConfig, dtype: DType) -> Model:
    """The checkpoint in `directory`, in `dtype`. Never holds more than one of its tensors twice.

    Raises UnsupportedModel if a tensor is missing or has another shape than the configuration says.
    """
    with torch.device("meta"):
        model = Llama(config, dtype)
    model = model.to(TORCH_DTYPES[dtype]).to_empty(device="cpu").eval().requires_grad_(False)
    places = dict(model.checkpoint_parts())
    shards = _shards(directory)
    if missing := places.keys() - shards.keys():
        raise UnsupportedModel(f"{directory}: tensor {min(missing)} is missing ({len(missing)} in all)")
    by_file: dict[str, list[str]] = defaultdict(list)
    for name in places:
        by_file[shards[name]].append(name)
    for file, names in by_file.items():
        _fill(directory / file, {name: places[name] for name in names})
    return model


def _shards(directory: Path) -> dict[str, str]:
    """Tensor name → name of the file that holds it."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        mapping: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return mapping
    return {name: file.name for file in sorted(directory.glob("*.safetensors")) for name in _names(file)}


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _fill(file: Path, places: dict[str, Tensor]) -> None:
    with safe_open(file, framework="pt") as tensors:
        for name, place in places.items():
            tensor = tensors.get_tensor(name)
            if tensor.shape != place.shape:
                expected, found = list(place.shape), list(tensor.shape)
                raise UnsupportedModel(f"{file}: tensor {name} has shape {found}, config.json asks for {expected}")
            place.copy_(tensor)
