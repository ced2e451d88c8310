"""`perigee bench moba`: prefill with block-sparse attention beside our own full attention, in one run."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from perigee.bench import ours, random_moonlight
from perigee.bench.errors import BenchError
from perigee.bench.machine import describe
from perigee.bench.workload import Job, Sizes, directory_of
from perigee.output import STDOUT, check_writable, publish_json
from perigee.workers.engine.engine import Engine
from perigee.workers.model.config import ModelConfig, load_config
from perigee.workers.model.moba_config import MobaConfig

Result = TypeVar("Result")


class MobaBenchConfig(BaseModel):
    """What to measure. Full and sparse prefill take turns; the best of the rounds counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(default="", description="checkpoint, as for `perigee up`; default: a random one of 72M")
    lengths: tuple[int, ...] = Field(default=(4096, 8192, 16384), description="prompt lengths in tokens")
    moba: str = Field(default="block_size=512,top_k=3", description="block-sparse attention, as for `perigee up`")
    max_batched_tokens: int = Field(default=65536, ge=1, description="tokens a step computes at most")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: all cores")
    rounds: int = Field(default=1, ge=1, description="rounds, of which the best counts")
    json_file: str = Field(default="", description="write the results as JSON to this file, - for standard output")


@dataclass(slots=True)
class Timer:
    """Seconds spent in some functions since the last `take`."""

    elapsed_s: float = 0.0

    def around(self, function: Callable[..., Result]) -> Callable[..., Result]:
        def timed(*args: Any, **kwargs: Any) -> Result:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.elapsed_s += time.perf_counter() - started

        return timed

    def take(self) -> float:
        elapsed_s, self.elapsed_s = self.elapsed_s, 0.0
        return elapsed_s


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one prefill: the whole model, its attention over cached tokens, and of that the gate."""

    model_s: float
    attention_s: float
    gate_s: float


class Subject:
    """An engine whose attention is timed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.attention, self.gate = Timer(), Timer()
        for layer in engine.runner.model.layers:
            backend: Any = layer.get_submodule("attention").backend
            chunks: Any = backend.chunks
            backend.attend = self.attention.around(backend.attend)
            chunks.choose = self.gate.around(chunks.choose)

    def prefill(self, length: int) -> Times:
        self.attention.take(), self.gate.take()
        return Times(ours.prefill_s(self.engine, length), self.attention.take(), self.gate.take())


def run(config: MobaBenchConfig) -> int:
    """Measures, and shows the results. Raises BenchError for a length that the model has no positions for."""
    check_writable(json=config.json_file)
    if config.threads:
        torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="perigee-bench-") as folder:
        directory = directory_of(config.model, "bfloat16") if config.model else random_moonlight.write(Path(folder))
        results = _measure(config, directory)
    if config.json_file != STDOUT:
        _print(results)
    publish_json(results, config.json_file)
    return 0


def _measure(config: MobaBenchConfig, directory: Path) -> dict[str, Any]:
    model = load_config(directory)
    if max(config.lengths) > model.max_context:
        raise BenchError(f"--lengths: {max(config.lengths)}; the model has {model.max_context} positions")
    full = _subject(config, directory, model, None)
    sparse = _subject(config, directory, model, MobaConfig.parse(config.moba))
    times = {length: _best(full, sparse, length, config.rounds) for length in config.lengths}
    return _results(config, times)


def _subject(config: MobaBenchConfig, directory: Path, model: ModelConfig, moba: MobaConfig | None) -> Subject:
    job = Job(directory, "bfloat16", torch.get_num_threads(), Sizes(config.lengths, ()))
    return Subject(ours.load(job, replace(model, moba=moba), config.max_batched_tokens))


def _best(full: Subject, sparse: Subject, length: int, rounds: int) -> tuple[Times, Times]:
    runs = [(full.prefill(length), sparse.prefill(length)) for _ in range(rounds)]
    return min((a for a, _ in runs), key=_model_s), min((b for _, b in runs), key=_model_s)


def _model_s(times: Times) -> float:
    return times.model_s


def _results(config: MobaBenchConfig, times: dict[int, tuple[Times, Times]]) -> dict[str, Any]:
    """Speed-ups are full over sparse; `exponent` is that of the time between the two longest lengths."""
    return {
        "attention_speedup": {str(n): round(a.attention_s / b.attention_s, 4) for n, (a, b) in times.items()},
        "model_speedup": {str(n): round(a.model_s / b.model_s, 4) for n, (a, b) in times.items()},
        "gate_share": {str(n): round(b.gate_s / b.attention_s, 4) for n, (_, b) in times.items()},
        "exponent": _exponent({n: b.attention_s for n, (_, b) in times.items()}),
        "model_exponent": _exponent({n: b.model_s for n, (_, b) in times.items()}),
        "seconds": {str(n): {"full": _as_json(a), "moba": _as_json(b)} for n, (a, b) in times.items()},
        "moba": config.moba,
        "max_batched_tokens": config.max_batched_tokens,
        "machine": describe(),
    }


def _exponent(seconds: dict[int, float]) -> float | None:
    """Of length, from a quarter of the longest to the longest, where both were measured."""
    longest = max(seconds)
    if longest // 4 not in seconds:
        return None
    return round(math.log(seconds[longest] / seconds[longest // 4], 4), 3)


def _as_json(times: Times) -> dict[str, float]:
    return {
        "model": round(times.model_s, 6),
        "attention": round(times.attention_s, 6),
        "gate": round(times.gate_s, 6),
    }


def _print(results: dict[str, Any]) -> None:
    table = Table(title=f"prefill, {results['moba']}")
    for column in ("tokens", "full s", "sparse s", "model", "attention", "gate"):
        table.add_column(column, justify="right")
    for length, seconds in results["seconds"].items():
        table.add_row(
            length,
            f"{seconds['full']['model']:.2f}",
            f"{seconds['moba']['model']:.2f}",
            f"{results['model_speedup'][length]:.2f}×",
            f"{results['attention_speedup'][length]:.2f}×",
            f"{results['gate_share'][length]:.0%}",
        )
    Console().print(table)
