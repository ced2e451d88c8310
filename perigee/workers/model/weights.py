"""Fills a model from safetensors, tensor by tensor, each where it belongs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from perigee.kvstore.blocks import DType
from perigee.workers.attention.base import TORCH_DTYPES
from perigee.workers.kernels.base import Kernels
from perigee.workers.kernels.registry import select
from perigee.workers.model.config import ModelConfig
from perigee.workers.model.decoder import Decoder
from perigee.workers.model.errors import UnsupportedModel
from perigee.workers.model.layers import Place, Prepared
from perigee.workers.model.llama import Llama
from perigee.workers.model.llama_config import LlamaConfig
from perigee.workers.model.moonlight import Moonlight
from perigee.workers.model.shards import Stored, files_by_tensor, read_header

_LOADABLE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PIECE_BYTES = 8 << 20  # read at once: more would gain nothing


def load_model(directory: Path, config: ModelConfig, dtype: DType) -> Decoder:
    """The checkpoint in `directory`, in `dtype`. Takes hardly more memory than the weights, whatever its dtype.

    Raises UnsupportedModel if a tensor is missing, or has another shape than the configuration says, or a dtype that is
    not a plain float's; CheckpointError if a file is damaged.
    """
    model = empty_model(config, dtype, select(dtype))
    places = dict(model.places())
    files = files_by_tensor(directory)
    if missing := places.keys() - files.keys():
        raise UnsupportedModel(f"{directory}: tensor {min(missing)} is missing ({len(missing)} in all)")
    for file in sorted({files[name] for name in places}):
        _fill(file, {name: place for name, place in places.items() if files[name] == file})
    for module in model.modules():
        if isinstance(module, Prepared):
            module.prepare()
    return model


@torch.no_grad()
def empty_model(config: ModelConfig, dtype: DType, kernels: Kernels) -> Decoder:
    """A model whose weights are still to be filled."""
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


def _fill(file: Path, places: Mapping[str, Place]) -> None:
    """Fills places whose tensors are all in `file`, in the order in which they lie there."""
    header = read_header(file)
    with file.open("rb") as content:
        for name in sorted(places, key=lambda name: header[name].offset):
            tensor = header[name]
            _check(f"{file}: tensor {name}", tensor, places[name])
            content.seek(tensor.offset)
            _read(content, _LOADABLE[tensor.dtype], places[name].view)


def _check(what: str, tensor: Stored, place: Place) -> None:
    if tensor.shape != place.shape:
        expected, found = list(place.shape), list(tensor.shape)
        raise UnsupportedModel(f"{what} has shape {found}, config.json asks for {expected}")
    if tensor.dtype not in _LOADABLE:
        raise UnsupportedModel(f"{what} has dtype {tensor.dtype}, which is not supported")


def _read(content: BufferedReader, dtype: torch.dtype, view: Tensor) -> None:
    """Reads a tensor from where `content` stands, rows at a time.

    So no tensor is ever held twice, and none is mapped: the pages of a mapped file count as memory too.
    """
    row_bytes = view[0].numel() * dtype.itemsize
    for rows in torch.split(view, max(1, _PIECE_BYTES // row_bytes)):
        read = torch.empty(rows.shape, dtype=dtype)
        content.readinto(read.view(torch.uint8).numpy().data)
        rows.copy_(read)
