"""Checks safetensors files by their headers, before anything is loaded. Never imports torch."""

import json
from collections.abc import Mapping
from pathlib import Path

from perigee.workers.model.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"

# As safetensors writes them. Others, such as F8_E4M3, are quantized: without their scales they are no weights.
LOADABLE_DTYPES = ("BF16", "F16", "F32")
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_PICKLED = ("*.bin", "*.pt", "*.pth")


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
    shards = {file.name: _header(file) for file in files}
    for tensor, name in index.items():
        if tensor not in shards[name]:
            raise CheckpointError(f"{directory / name}: no tensor {tensor}, which {INDEX_FILE} says is there")
    for name, dtypes in shards.items():
        _check_dtypes(directory / name, dtypes)


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


def _header(path: Path) -> Mapping[str, str]:
    """Tensor name → its dtype."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        content = file.read(num_bytes) if num_bytes <= _MAX_HEADER_BYTES else b""
    try:
        header = dict(json.loads(content))
        header.pop("__metadata__", None)
        dtypes = {name: str(tensor["dtype"]) for name, tensor in header.items()}
        data_bytes = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error!r}") from error
    expected, found = 8 + num_bytes + data_bytes, path.stat().st_size
    if found != expected:
        raise CheckpointError(f"{path}: holds {found} bytes, its header asks for {expected}")
    return dtypes


def _check_dtypes(path: Path, dtypes: Mapping[str, str]) -> None:
    for name, dtype in dtypes.items():
        if name.endswith((".weight", ".bias")) and dtype not in LOADABLE_DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {dtype}, which is not supported; "
                f"supported are {', '.join(LOADABLE_DTYPES)}"
            )
