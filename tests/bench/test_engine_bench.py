"""`perigee bench engine` measures what it says it does. How fast anything is, is not tested."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perigee.bench.engine import EngineBenchConfig, run
from perigee.bench.errors import BenchError
from perigee.bench.peers.transformers_peer import Transformers

SIZES = {
    "prefill_tokens_per_s": ["16", "40"],
    "decode_tokens_per_s": ["1", "2"],
    "decode_with_prompts_tokens_per_s": ["1", "2"],
}


def assert_figures(figures: Any) -> None:
    """Every size that was asked for has a rate."""
    for key, sizes in SIZES.items():
        assert list(figures[key]) == sizes
        assert min(figures[key].values()) > 0


def configuration(model: Path, **fields: Any) -> EngineBenchConfig:
    small: dict[str, Any] = {"dtype": "float32", "prefill": (16, 40), "decode": (1, 2), "rounds": 1}
    return EngineBenchConfig(model=str(model), **{**small, "transformers": False, "json_file": "-", **fields})


@pytest.mark.slow
def test_the_engine_its_peer_and_the_limit_are_measured_at_the_same_sizes(tiny_llama: Path) -> None:
    flags = ["--dtype=float32", "--threads=1", "--prefill=16,40", "--decode=1,2", "--rounds=1", "--json=-"]
    command = [sys.executable, "-m", "perigee", "bench", "engine", f"--model={tiny_llama}", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    results = json.loads(ended.stdout)
    peer = results["peers"]["transformers"]
    for figures in (results, results["limit"], results["fraction_of_limit"], peer, peer["ratio"]):
        assert_figures(figures)
    assert results["machine"]["threads"] == 1
    assert results["notes"] == []


def test_sizes_beyond_the_models_context_are_left_out_with_a_note(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(configuration(tiny_llama, prefill=(16, 8192, 40, 100_000))) == 0
    written = capsys.readouterr()
    results = json.loads(written.out)
    assert_figures(results)
    assert_figures(results["limit"])
    assert results["notes"] == ["left out: prefill 8192, 100000: beyond the model's context of 8192 tokens"]
    assert results["notes"][0] in written.err


def test_no_size_within_the_context_is_an_error_that_says_so(tiny_llama: Path) -> None:
    with pytest.raises(BenchError, match="--prefill, --decode: no size fits into the model's context of 8192 tokens"):
        run(configuration(tiny_llama, prefill=(9000,), decode=()))


def test_sizes_below_one_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="every size must be at least 1"):
        configuration(tiny_llama, prefill=(0,))


def test_a_peer_that_is_not_installed_is_left_out_with_a_note(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Transformers, "is_installed", lambda: False)
    file = tmp_path / "results.json"
    run(configuration(tiny_llama, transformers=True, json_file=str(file)))
    results = json.loads(file.read_text())
    assert results["notes"] == ["left out: transformers: is not installed"]
    assert results["peers"] == {}
    assert "transformers: is not installed" in capsys.readouterr().err


def test_a_checkpoint_needs_no_tokenizer_to_be_measured(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(tiny_llama / name)
    file = tmp_path / "results.json"
    run(configuration(tmp_path, prefill=(16,), decode=(1,), json_file=str(file)))
    assert json.loads(file.read_text())["prefill_tokens_per_s"]["16"] > 0


def test_llama_cpp_beside_another_architecture_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(BenchError, match="--llama-cpp: only checkpoints of DeepSeek's architecture"):
        run(configuration(tiny_llama, llama_cpp="/nonexistent"))
