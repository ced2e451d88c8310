"""Safetensors files: what their headers say, checked before anything is loaded. Never imports torch."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perigee.workers.model.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"

# As safetensors writes them, and their sizes in bytes. Others, such as F8_E4M3, are quantized: they are no weights
# without their scales.
LOADABLE_DTYPES = {"BF16": 2, "F16": 2, "F32": 4}
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_PICKLED = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a safetensors file."""

    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


def check_shards(directory: Path) -> None:
    """Raises CheckpointError, naming file and tensor, if the weights in `directory` cannot be served.

    That is: none in safetensors, a shard missing or cut short, a tensor not where the index says, or of another dtype.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"model: directory {str(directory)!r} lacks *.safetensors{_pickled(directory)}")
    index = _index(directory / INDEX_FILE)
    if missing := sorted({file for file in index.values() if not (directory / file).is_file()}):
        raise CheckpointError(
            f"model: directory {str(directory)!r} lacks {missing[0]}, which {INDEX_FILE} names "
            f"({len(missing)} of {len(set(index.values()))} files are missing)"
        )
    shards = {file.name: read_header(file) for file in files}
    for tensor, name in index.items():
        if tensor not in shards[name]:
            raise CheckpointError(f"{directory / name}: no tensor {tensor}, which {INDEX_FILE} says is there")
    for name, tensors in shards.items():
        _check_dtypes(directory / name, tensors)


def files_by_tensor(directory: Path) -> Mapping[str, Path]:
    """Which file holds each tensor: as the index says, or, without one, as the files do."""
    if index := _index(directory / INDEX_FILE):
        return {name: directory / file for name, file in index.items()}
    return {name: file for file in sorted(directory.glob("*.safetensors")) for name in read_header(file)}


def _pickled(directory: Path) -> str:
    found = sorted(file.name for pattern in _PICKLED for file in directory.glob(pattern))
    return f"; of {found[0]} nothing is read: only safetensors are loaded, which cannot hold code" if found else ""


def _index(path: Path) -> Mapping[str, str]:
    """Tensor name → name of the file that holds it. Empty if there is no index."""
    if not path.is_file():
        return {}
    try:
        index = dict(json.loads(path.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors files: {error!r}") from error
    # Also keeps every file that is read inside the directory.
    if strays := [file for file in index.values() if Path(str(file)).name != file or not file.endswith(".safetensors")]:
        raise CheckpointError(f"{path}: weight_map: {strays[0]!r} is not the name of a safetensors file")
    return index


def read_header(path: Path) -> Mapping[str, Stored]:
    """The tensors of a safetensors file by name. Raises CheckpointError if it is none, or not all of it is there."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        content = file.read(num_bytes) if num_bytes <= _MAX_HEADER_BYTES else b""
    try:
        entries = dict(json.loads(content))
        entries.pop("__metadata__", None)
        tensors = {name: _stored(entry, 8 + num_bytes) for name, entry in entries.items()}
        data_bytes = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error!r}") from error
    expected, found = 8 + num_bytes + data_bytes, path.stat().st_size
    if found != expected:
        raise CheckpointError(f"{path}: holds {found} bytes, its header asks for {expected}")
    return tensors


def _stored(entry: Mapping[str, Any], data_offset: int) -> Stored:
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    first, end = (int(offset) for offset in entry["data_offsets"])
    if dtype in LOADABLE_DTYPES and end - first != math.prod(shape) * LOADABLE_DTYPES[dtype]:
        raise ValueError(f"{end - first} bytes for a tensor of shape {list(shape)} in {dtype}")
    return Stored(dtype, shape, data_offset + first)


def _check_dtypes(path: Path, tensors: Mapping[str, Stored]) -> None:
    for name, tensor in tensors.items():
        if name.endswith((".weight", ".bias")) and tensor.dtype not in LOADABLE_DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {tensor.dtype}, which is not supported; "
                f"supported are {', '.join(LOADABLE_DTYPES)}"
            )
