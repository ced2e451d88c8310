"""`perigee simulate`, as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "deploy" / "clusters" / "llama3-70b-a800.yaml"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    rows = [
        {
            "timestamp": 200 * index,
            "input_length": 3000,
            "output_length": 20,
            "hash_ids": [0, 1, *range(9 * index + 9, 9 * index + 13)],
        }
        for index in range(20)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def simulated(*arguments: str, hash_seed: int = 0) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "perigee", "simulate", *arguments]
    environ = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ)


def test_the_same_command_writes_the_same_bytes(trace: Path, tmp_path: Path) -> None:
    tight = tmp_path / "cluster.yaml"
    tight.write_text(EXAMPLE.read_text(encoding="utf-8").replace("dram_gib: 1000", "capacity_tokens: 8192"))
    arguments = [str(trace), "--cluster", str(tight), "--placement", "random", "--html", str(tmp_path / "run.html")]
    first, second = (simulated(*arguments, "--json", "-", hash_seed=hash_seed) for hash_seed in (1, 2))
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert (report["requests"], report["completed"], report["about"]["placement"]) == (20, 20, "random")
    assert report["cached_by_tier"]["dram"] > 0
    assert len(report["series"]["decode_load"]) == len(report["series"]["at_s"]) > 1
    assert first.stdout == second.stdout
    assert "<svg" in (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "cached tokens" in first.stderr  # the tables make way for JSON


def test_what_cannot_be_used_is_named(trace: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "cluster.yaml"
    wrong.write_text(EXAMPLE.read_text(encoding="utf-8").replace("count: 8", "count: none"), encoding="utf-8")
    for code, arguments, complaint in (
        (1, ["--cluster", str(wrong)], "nodes.0.count: 'none'"),
        (1, ["--cluster", str(EXAMPLE), "--placement", "best"], "placement: is 'best', allowed are"),
        (2, ["--cluster", str(EXAMPLE), "--html", str(tmp_path / "no" / "run.html")], "run.html' cannot be written"),
    ):
        ended = simulated(str(trace), *arguments)
        assert ended.returncode == code and complaint in ended.stderr
