"""Fills a model from safetensors, tensor by tensor, straight into the place where each belongs."""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from perigee.kvstore.blocks import DType
from perigee.workers.attention.base import TORCH_DTYPES
from perigee.workers.kernels.registry import select
from perigee.workers.model.config import ModelConfig
from perigee.workers.model.decoder import Decoder
from perigee.workers.model.errors import UnsupportedModel
from perigee.workers.model.layers import Place, Prepared
from perigee.workers.model.llama import Llama
from perigee.workers.model.llama_config import LlamaConfig
from perigee.workers.model.moonlight import Moonlight

_LOADABLE = (torch.float32, torch.bfloat16, torch.float16)


def load_model(directory: Path, config: ModelConfig, dtype: DType) -> Decoder:
    """The checkpoint in `directory`, in `dtype`. Never holds more than one of its tensors twice.

    Raises UnsupportedModel if a tensor is missing, or has another shape than the configuration says, or a dtype that is
    not a plain float's.
    """
    model = _empty(config, dtype)
    places = dict(model.places())
    shards = _shards(directory)
    if missing := places.keys() - shards.keys():
        raise UnsupportedModel(f"{directory}: tensor {min(missing)} is missing ({len(missing)} in all)")
    by_file: dict[str, list[str]] = defaultdict(list)
    for name in places:
        by_file[shards[name]].append(name)
    for file, names in by_file.items():
        _fill(directory / file, {name: places[name] for name in names})
    for module in model.modules():
        if isinstance(module, Prepared):
            module.prepare()
    return model


@torch.no_grad()
def _empty(config: ModelConfig, dtype: DType) -> Decoder:
    kernels = select(dtype)
    with _default_dtype(TORCH_DTYPES[dtype]):
        model = Llama(config, kernels) if isinstance(config, LlamaConfig) else Moonlight(config, kernels)
    return model.eval().requires_grad_(False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What tensors are made with while a model is built; those that name another dtype keep it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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


def _fill(file: Path, places: dict[str, Place]) -> None:
    with safe_open(file, framework="pt") as tensors:
        for name, place in places.items():
            tensor = tensors.get_tensor(name)
            if tensor.shape != place.shape:
                expected, found = list(place.shape), list(tensor.shape)
                raise UnsupportedModel(f"{file}: tensor {name} has shape {found}, config.json asks for {expected}")
            if tensor.dtype not in _LOADABLE:
                raise UnsupportedModel(f"{file}: tensor {name} has dtype {tensor.dtype}, which is not supported")
            place.fill(tensor)
