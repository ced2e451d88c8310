"""`perigee bench engine`: prefill and decode of the engine alone, beside the machine's limit and beside its peers."""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from perigee.bench import ours
from perigee.bench.errors import BenchError
from perigee.bench.limits import limits, weight_bytes
from perigee.bench.machine import MachineRates, describe
from perigee.bench.peers.base import Peer
from perigee.bench.peers.llama_cpp import LlamaCpp
from perigee.bench.peers.transformers_peer import Transformers
from perigee.bench.peers.vllm_peer import Vllm
from perigee.bench.report import Report, publish
from perigee.bench.workload import Figures, Job, Sizes, best, directory_of
from perigee.output import check_writable
from perigee.workers.model.config import ModelConfig, load_config
from perigee.workers.model.moonlight_config import MoonlightConfig


class EngineBenchConfig(BaseModel):
    """What to measure, and beside whom. Ours and the peers' rounds take turns; the best of each counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(default="smollm2-135m-instruct", description="checkpoint, as for `perigee up`")
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of weights and KVCache")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: all cores")
    prefill: tuple[int, ...] = Field(default=(1000, 2048, 8192), description="prompt lengths in tokens")
    decode: tuple[int, ...] = Field(default=(1, 8, 32), description="numbers of concurrent streams")
    rounds: int = Field(default=3, ge=1, description="rounds, of which the best counts")
    transformers: bool = Field(default=True, description="measure beside transformers, where it is installed")
    vllm: str = Field(default="", description="measure beside vLLM: the `python` of its virtual environment")
    llama_cpp: str = Field(default="", description="measure beside llama.cpp: the folder of its programs")
    json_file: str = Field(default="", description="write the results as JSON to this file, - for standard output")

    @field_validator("prefill", "decode")
    @classmethod
    def _positive(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 1 for size in sizes):
            raise ValueError("every size must be at least 1")
        return sizes


def run(config: EngineBenchConfig) -> int:
    """Measures, and shows the results. Raises BenchError if a peer that was asked for fails."""
    check_writable(json=config.json_file)
    if config.threads:
        torch.set_num_threads(config.threads)
    directory = directory_of(config.model, config.dtype)
    model = load_config(directory)
    job = Job(directory, config.dtype, torch.get_num_threads(), _sizes(config, model))
    notes = list(_notes(config, job.sizes, model))
    for note in notes:
        sys.stderr.write(f"perigee bench engine: {note}\n")
    with tempfile.TemporaryDirectory(prefix="perigee-bench-") as scratch:
        report = _measure(job, model, _peers(config, job, model, Path(scratch)), config.rounds, notes)
    publish(report, config.json_file)
    return 0


def _sizes(config: EngineBenchConfig, model: ModelConfig) -> Sizes:
    sizes = Sizes(config.prefill, config.decode).within(model.max_context)
    if not (sizes.prefill or sizes.decode):
        raise BenchError(f"--prefill, --decode: no size fits into the model's context of {model.max_context} tokens")
    return sizes


def _notes(config: EngineBenchConfig, sizes: Sizes, model: ModelConfig) -> Iterator[str]:
    """What is not measured, and why."""
    for name, asked, fitting in (("prefill", config.prefill, sizes.prefill), ("decode", config.decode, sizes.decode)):
        if left_out := [str(size) for size in asked if size not in fitting]:
            yield f"left out: {name} {', '.join(left_out)}: beyond the model's context of {model.max_context} tokens"
    if config.transformers and not Transformers.is_installed():
        yield "left out: transformers: is not installed"


def _peers(config: EngineBenchConfig, job: Job, model: ModelConfig, scratch: Path) -> list[Peer]:
    peers: list[Peer] = []
    if config.transformers and Transformers.is_installed():
        peers.append(Transformers(job))
    if config.vllm:
        peers.append(Vllm(job, model.vocab_size, Path(config.vllm)))
    if config.llama_cpp:
        if not isinstance(model, MoonlightConfig):
            raise BenchError("--llama-cpp: only checkpoints of DeepSeek's architecture are converted for it")
        peers.append(LlamaCpp(job, model, Path(config.llama_cpp), scratch))
    return peers


def _measure(job: Job, model: ModelConfig, peers: Sequence[Peer], rounds: int, notes: Sequence[str]) -> Report:
    """The machine, ours and the peers in turn, so that all see its good and its bad minutes."""
    engine = ours.load(job, model)
    rates: list[MachineRates] = []
    figures: list[Figures] = []
    theirs: dict[str, list[Figures]] = {peer.name: [] for peer in peers}
    for _ in range(rounds):
        rates.append(MachineRates.measure(job.dtype, weight_bytes(model, job.dtype)))
        figures.append(ours.measure_engine(engine, job.sizes))
        for peer in peers:
            theirs[peer.name].append(peer.measure())
    machine = MachineRates.best(rates)
    limit = limits(model, machine, job.dtype, job.sizes)
    best_theirs = {name: best(runs) for name, runs in theirs.items()}
    return Report(best(figures), limit, best_theirs, machine, describe(), notes)
