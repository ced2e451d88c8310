"""`perigee bench engine` measures what it says it does. How fast anything is, is not tested."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perigee.bench.engine import EngineBenchConfig, run

pytestmark = pytest.mark.slow  # measures the machine

PHASES = {"prefill_tokens_per_s": ["16", "40"], "decode_tokens_per_s": ["1", "2"]}


def assert_figures(figures: Any) -> None:
    """Every size that was asked for has a rate."""
    for phase, sizes in PHASES.items():
        assert list(figures[phase]) == sizes
        assert min(figures[phase].values()) > 0


def test_the_engine_its_peer_and_the_limit_are_measured_at_the_same_sizes(tiny_llama: Path) -> None:
    flags = ["--dtype=float32", "--threads=1", "--prefill=16,40", "--decode=1,2", "--repeats=1", "--json=-"]
    command = [sys.executable, "-m", "perigee", "bench", "engine", f"--model={tiny_llama}", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    results = json.loads(ended.stdout)
    for figures in (results, results["limit"], results["transformers"]):
        assert_figures(figures)
    assert results["machine"]["threads"] == 1
    assert "peer_missing" not in results


def test_a_peer_that_is_not_installed_is_said_to_be_missing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "results.json"
    sizes = {"prefill": (16, 40), "decode": (1, 2)}
    run(EngineBenchConfig(model=str(tiny_llama), dtype="float32", repeats=1, json_file=str(file), **sizes))
    results = json.loads(file.read_text())
    assert results["peer_missing"] == "transformers"
    assert "transformers is not installed" in capsys.readouterr().err
    assert_figures(results)
    assert_figures(results["limit"])
