"""Models by their Hugging Face names: downloaded once, and served from the cache where there is no network."""

import logging
import os
import time
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from perigee.workers.model.errors import CheckpointError

logger = logging.getLogger(__name__)

# What is read of a repository, all at its top. Nothing that could execute is among it: no *.py, *.bin, *.pt.
WANTED_FILES = ("*.json", "*.safetensors", "*.jinja", "tiktoken.model")


def download(name: str) -> Path:
    """The directory with the files of `name`, which is `owner/model` or `owner/model@revision`.

    Only what is not in the cache of huggingface_hub already is transferred. HF_HOME, HF_ENDPOINT, HF_TOKEN and
    HF_HUB_OFFLINE mean what they mean there. Raises CheckpointError if it is neither to be had nor in the cache.
    """
    repository, _, revision = name.partition("@")
    started = time.monotonic()
    try:
        directory = snapshot_download(
            repository, revision=revision or None, allow_patterns=list(WANTED_FILES), ignore_patterns=["*/*"]
        )
    except (HTTPError, XetDownloadError, HFValidationError, OSError) as error:
        raise CheckpointError(f"model: {name!r} {_reason(error, repository, revision)}") from error
    logger.info("model found name=%s directory=%s s=%.1f", name, directory, time.monotonic() - started)
    return Path(directory)


def _reason(error: Exception, repository: str, revision: str) -> str:
    """Why there is no model. The order matters: a gated repository's error is also one of a missing repository."""
    hub = os.environ.get("HF_ENDPOINT", "Hugging Face")
    match error:
        case GatedRepoError():
            return f"is gated: accept its terms on {hub}, then set HF_TOKEN to a token of that account"
        case RepositoryNotFoundError():
            return (
                f"is neither a path here nor a model that {hub} shows us: check the spelling of {repository!r}, or set "
                "HF_TOKEN if it is private"
            )
        case RevisionNotFoundError():
            return f"has no revision {revision!r} on {hub}; allowed are its branches, tags and commits"
        case LocalEntryNotFoundError():
            return (
                f"is neither a path here nor whole in the local cache, and {hub} cannot be reached "
                f"({_first_line(error.__cause__ or error)})"
            )
        case _:
            return f"could not be downloaded from {hub}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
