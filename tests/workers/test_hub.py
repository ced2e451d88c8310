"""Hugging Face names: downloaded from a hub on loopback, by a process of their own, as a server or worker would."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.moonlight_files import TRAP_FILE, write_tiktoken
from tests.workers import hub_server
from tests.workers.hub_server import COMMIT, GATED, NAME, Hub

RESOLVE = """
import sys
from perigee.workers.model.checkpoint import resolve, tokenizer_digest
from perigee.workers.model.errors import CheckpointError
from perigee.workers.model.tokenizer import Tokenizer
for name in sys.argv[1:]:
    try:
        directory = resolve(name, "float32")
        Tokenizer.load(directory), tokenizer_digest(directory)
        print(directory)
    except CheckpointError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def published(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub holds: a model with a tiktoken vocabulary, and much beside that must not be downloaded."""
    directory = write_tiktoken(tmp_path_factory.mktemp("published"), 384)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(tiny_llama / name, directory / name)
    for name in ("pytorch_model.bin", "weights.pt", "README.md", "modeling_deepseek.py"):
        (directory / name).write_text("unwanted")
    (directory / "original").mkdir()
    (directory / "original" / "params.json").write_text("{}")
    return directory


WANTED = {"config.json", "generation_config.json", "model.safetensors", "tiktoken.model", "tokenizer_config.json"}


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    with hub_server.running(published) as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty cache of huggingface_hub."""
    return tmp_path / "hugging-face"


def unused_url() -> str:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def outcomes(names: Sequence[str], home: Path, url: str, **environment: str) -> list[str]:
    """The directory of each name, or why there is none, from one process that knows of no hub but `url`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    result = subprocess.run(
        [sys.executable, "-c", RESOLVE, *names],
        env=kept | settings | environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=home.parent,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def outcome(name: str, home: Path, url: str, **environment: str) -> str:
    (only,) = outcomes([name], home, url, **environment)
    return only


def resolved(name: str, home: Path, url: str, **environment: str) -> Path:
    found = outcome(name, home, url, **environment)
    assert not found.startswith("model: "), found
    return Path(found)


def test_a_name_is_downloaded_without_what_could_execute(hub: Hub, home: Path, published: Path) -> None:
    directory = resolved(NAME, home, hub.url)
    assert {path.name for path in directory.iterdir()} == hub.downloaded() == WANTED
    for name in WANTED:
        assert (directory / name).read_bytes() == (published / name).read_bytes()
    assert not (published / TRAP_FILE).exists()


def test_what_is_cached_is_not_downloaded_again(hub: Hub, home: Path) -> None:
    directory = resolved(NAME, home, hub.url)
    hub.requested.clear()
    assert resolved(NAME, home, hub.url) == directory
    assert hub.downloaded() == set()
    hub.requested.clear()
    assert resolved(NAME, home, hub.url, HF_HUB_OFFLINE="1") == directory
    assert hub.requested == []


def test_a_revision_may_be_asked_for(hub: Hub, home: Path) -> None:
    by_tag, by_commit = outcomes([f"{NAME}@v1.0", f"{NAME}@{COMMIT}"], home, hub.url)
    assert Path(by_tag).is_dir()
    assert by_tag == by_commit
    assert [path for path in hub.requested if "/revision/" in path] == [f"/api/models/{NAME}/revision/v1.0"]


def test_what_the_hub_refuses_is_said(hub: Hub, home: Path) -> None:
    expected = {
        "moon/dark": "'moon/dark' is neither a path here nor a model that http://.* shows us",
        f"{NAME}@v9": f"'{NAME}@v9' has no revision 'v9' on http://.*; allowed are",
        GATED: f"'{GATED}' is gated: accept its terms on http://.*, then set HF_TOKEN",
        "moon/li--ght": "'moon/li--ght' could not be downloaded from .*: .*--",
    }
    said = outcomes(list(expected), home, hub.url)
    for line, message in zip(said, expected.values(), strict=True):
        assert re.match(f"model: {message}", line)
    assert hub.downloaded() == set()


def test_without_a_network_only_what_is_whole_in_the_cache_is_served(hub: Hub, home: Path) -> None:
    nobody = unused_url()
    refusal = f"model: '{NAME}' is neither a path here nor whole in the local cache, and {nobody} cannot be reached"
    assert outcome(NAME, home, nobody).startswith(refusal)
    directory = resolved(NAME, home, hub.url)
    assert resolved(NAME, home, nobody) == directory
    (directory / "model.safetensors").unlink()
    assert outcome(NAME, home, nobody).startswith(refusal)


def test_a_directory_of_that_name_comes_first(hub: Hub, home: Path, published: Path) -> None:
    shutil.copytree(published, home.parent / NAME)
    assert resolved(NAME, home, hub.url) == home.parent / NAME
    assert hub.requested == []


def test_importing_does_not_load_the_hub_s_library() -> None:
    script = "import sys, perigee.workers.model.checkpoint; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
