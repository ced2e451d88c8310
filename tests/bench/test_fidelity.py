"""The simulator beside a live cluster: what is compared, and that the whole comparison runs."""

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from perigee.bench.errors import BenchError
from perigee.bench.fidelity import Comparison, Figures, run_speed
from perigee.bench.pinned import pin
from perigee.replay.metrics import Distribution
from perigee.replay.trace import TraceRequest
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.cost.profile_file import Origin, ProfileFile

NOTHING = Distribution(None, None, None, None)
PROFILE = CostProfile(prefill_fixed_s=0.0, prefill_token_s=1e-3, prefill_pair_s=0.0)


def figures(ttft_s: float) -> Figures:
    return Figures(ttft_s, 2 * ttft_s, 0.01, 0.02)


def comparison() -> Comparison:
    profile = ProfileFile.of(PROFILE, Origin(method="measured"))
    return Comparison(profile, 2.0, True, [figures(1.25), figures(1.0), figures(0.5)], figures(1.0))


def test_ratios_are_of_simulated_over_live_with_their_spread() -> None:
    document = comparison().as_json()
    assert document["ratio"] == {"ttft_mean_s": 1.0, "ttft_p90_s": 1.0, "tbt_mean_s": 1.0, "tbt_p90_s": 1.0}
    assert document["ratio_spread"]["ttft_mean_s"] == [0.8, 2.0]
    assert len(document["live"]) == 3
    json.dumps(document)


def test_the_table_shows_medians_and_the_spread() -> None:
    text = StringIO()
    Console(width=120, file=text).print(comparison().table())
    shown = next(each for each in text.getvalue().splitlines() if "ttft_mean" in each)
    assert shown.replace("│", " ").split() == [
        "ttft_mean",
        "1000.0",
        "ms",
        "1000.0",
        "ms",
        "1.00",
        "0.80",
        "to",
        "2.00",
    ]


def test_nothing_measured_is_refused() -> None:
    with pytest.raises(BenchError, match="no request had two tokens"):
        Figures.of(Distribution(1.0, 1.0, 1.0, 1.0), NOTHING)


def test_the_trace_is_sped_up_until_prompts_take_their_share_of_the_time() -> None:
    trace = [TraceRequest(arrival_s, 1000, 1, (), 512) for arrival_s in (0.0, 4.0, 10.0)]  # three seconds of prefill
    assert run_speed(trace, PROFILE, 0.3) == pytest.approx(1.0)
    assert run_speed(trace, PROFILE, 0.6) == pytest.approx(2.0)


def test_a_trace_whose_requests_come_at_once_has_no_such_speed() -> None:
    with pytest.raises(BenchError, match="all come at once"):
        run_speed([TraceRequest(1.0, 1000, 1, (), 512)] * 2, PROFILE, 0.3)


def test_pinned_processes_have_a_core_each_with_all_their_threads() -> None:
    script = "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); print('up', flush=True)"
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        enough = pin([process.pid for process in processes])
        cores = sorted(os.sched_getaffinity(0))
        for index, process in enumerate(processes):
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                assert os.sched_getaffinity(int(thread.name)) == {cores[index % len(cores)]}
        assert enough == (len(cores) >= 2)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def line(index: int) -> dict[str, object]:
    """Of a trace: each prompt goes on where the one before ended."""
    length = 512 * (index + 1) + 188
    return {"timestamp": 500 * index, "input_length": length, "output_length": 64, "hash_ids": [*range(index + 2)]}


@pytest.mark.slow
def test_a_small_cluster_is_measured_replayed_and_simulated(tiny_llama: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(line(index)) + "\n" for index in range(6)))
    flags = (f"--model={tiny_llama}", "--repeats=2", "--profile-s=1", "--profile-tokens=256", "--json=-")
    command = [sys.executable, "-m", "perigee", "bench", "fidelity", str(trace), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert len(document["live"]) == 2
    assert all(ratio > 0 for ratio in document["ratio"].values())
    assert document["profile"]["origin"]["method"] == "measured"


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(line(index)) + "\n" for index in range(2)))
    command = [sys.executable, "-m", "perigee", "bench", "fidelity", str(trace), "--model=/nowhere"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 1
    assert "perigee bench fidelity: model: the cluster for '/nowhere' did not start" in ended.stderr
