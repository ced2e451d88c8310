"""Peers' processes, and what is read out of them. In their place are programs that answer alike."""

import json
import os
import sys
from pathlib import Path

import pytest

from perigee.bench.errors import PeerFailed
from perigee.bench.peers.base import run_peer
from perigee.bench.peers.llama_cpp import SETTINGS, batches, parse, winners
from perigee.bench.peers.vllm_peer import Vllm
from perigee.bench.workload import Figures, Job, Sizes

# What `import vllm` finds: an engine for which 10 ms pass with each new token of all sequences, on a clock of its own.
FAKE_VLLM = """
import json, os, time
from types import SimpleNamespace as SamplingParams
now_s = 0.0
time.perf_counter = lambda: now_s
class LLM:
    def __init__(self, model, **options):
        open(model + "/asked.json", "w").write(json.dumps([options, os.environ["VLLM_CPU_OMP_THREADS_BIND"]]))
    def generate(self, prompts, sampling, use_tqdm):
        global now_s
        assert all(2 <= token < 100 for prompt in prompts for token in prompt["prompt_token_ids"])
        now_s += 0.01 * sampling.max_tokens
"""


def job(directory: Path, prefill: tuple[int, ...] = (16, 40), decode: tuple[int, ...] = (1, 2)) -> Job:
    return Job(directory, "bfloat16", 1, Sizes(prefill, decode))


@pytest.fixture
def vllm_python(tmp_path: Path) -> Path:
    """An interpreter that has the stand-in for vLLM."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "vllm.py").write_text(FAKE_VLLM)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_vllm_is_measured_by_its_own_interpreter(vllm_python: Path, tmp_path: Path) -> None:
    figures = Vllm(job(tmp_path), 100, vllm_python).measure()
    assert figures.prefill == pytest.approx({16: 1600.0, 40: 4000.0})
    assert figures.decode == pytest.approx({1: 100.0, 2: 200.0})  # the first token's time is the prompt's
    assert figures.decode_with_prompts == pytest.approx({1: 100.0, 2: 200.0})


def test_vllm_gets_as_many_cores_as_there_are_threads(vllm_python: Path, tmp_path: Path) -> None:
    Vllm(job(tmp_path, decode=()), 100, vllm_python).measure()
    options, cores = json.loads((tmp_path / "asked.json").read_text())
    assert cores == str(min(os.sched_getaffinity(0)))
    assert options["dtype"] == "bfloat16"
    assert not options["enable_prefix_caching"]


def test_a_peer_that_fails_is_named_with_its_last_words() -> None:
    with pytest.raises(PeerFailed, match=r"vllm: ended with exit code 3:\nno such thing"):
        run_peer("vllm", [sys.executable, "-c", "import sys; sys.stderr.write('no such thing'); sys.exit(3)"])


def test_a_peer_that_writes_no_figures_has_failed() -> None:
    with pytest.raises(PeerFailed, match="ended with exit code 0"):
        run_peer("vllm", [sys.executable, "-c", ""])


def test_a_peer_whose_program_is_not_there_is_named() -> None:
    with pytest.raises(PeerFailed, match="vllm: /nonexistent/python: No such file or directory"):
        run_peer("vllm", ["/nonexistent/python"])


def test_llama_cpps_output_is_read_by_prompt_length_and_number_of_streams() -> None:
    prefill = {"pp": 2048, "tg": 1, "pl": 1, "t_pp": 2.0, "t_tg": 0.1}
    decode = {"pp": 64, "tg": 128, "pl": 8, "t_pp": 0.5, "t_tg": 2.0}
    figures = parse(["0.04 W load: a warning", json.dumps(prefill), "", json.dumps(decode)])
    assert figures == Figures({2048: 1024.0}, {8: 512.0}, {8: 8 * 128 / 2.5})


def test_llama_cpp_runs_once_for_prompts_and_once_for_each_output_length(tmp_path: Path) -> None:
    runs = list(batches(job(tmp_path, (2048, 8192), (1, 8, 32))))
    assert runs == [((2048, 8192), 1, (1,)), ((64,), 64, (32,)), ((64,), 128, (1, 8))]


def test_only_settings_that_were_best_at_some_size_are_tried_again() -> None:
    runs = {
        SETTINGS[0]: Figures({2048: 9.0}, {1: 1.0}, {1: 1.0}),
        SETTINGS[1]: Figures({2048: 2.0}, {1: 2.0}, {1: 2.0}),
        SETTINGS[2]: Figures({2048: 8.0}, {1: 1.5}, {1: 1.5}),
    }
    assert winners(runs, Figures({2048: 9.0}, {1: 2.0}, {1: 2.0})) == SETTINGS[:2]
