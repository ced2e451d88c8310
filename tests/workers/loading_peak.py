"""Run as a process: loads a checkpoint as a worker does, and writes the bytes of memory that this took at its peak."""

import sys
from pathlib import Path

from perigee.workers.config import WorkerConfig
from perigee.workers.loading import load_engine, model_card
from perigee.workers.model.config import load_config


def loading_peak(directory: Path) -> int:
    """What the process takes at most, beyond what it took before and what its KV pool takes."""
    config = WorkerConfig(
        id="peak",
        role="mixed",
        model=str(directory),
        store=Path("/nonexistent"),
        directory="unix:/nonexistent",
        kv_tokens=1024,
    )
    before = _status("VmRSS")
    model = load_config(directory)
    engine = load_engine(directory, model, config)
    model_card(directory, model, config)
    return _status("VmHWM") - before - engine.runner.pool.tensor.nbytes


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.stdout.write(str(loading_peak(Path(sys.argv[1]))))
