"""`perigee bench recall`: whether a model finds a stated pass key again, with full attention and with MoBA."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from perigee.bench import ours
from perigee.bench.errors import BenchError
from perigee.bench.haystack import Needle, haystacks
from perigee.bench.heldout import MEASURED_LENGTH, loss_of, token_rows
from perigee.bench.machine import describe
from perigee.bench.workload import Job, Sizes, directory_of
from perigee.kvstore.blocks import DType
from perigee.output import STDOUT, check_writable, publish_json
from perigee.training.text import documents, is_held_out
from perigee.workers.engine.engine import Engine
from perigee.workers.engine.sequence import Ref, Sampling
from perigee.workers.engine.sequence import Sequence as TokenSequence
from perigee.workers.model.checkpoint import NANO
from perigee.workers.model.config import ModelConfig, load_config
from perigee.workers.model.moba_config import MobaConfig
from perigee.workers.model.tokenizer import Tokenizer

ANSWER_TOKENS = 8  # room for a key, however its digits are cut
SHORTEST = 256
SUFFICES = 10_000_000  # bytes of text, of which the held-out documents are the haystack


class RecallBenchConfig(BaseModel):
    """What to ask. A trial is a prompt that states pass keys in the midst of text, and ends in one of the statements up
    to its key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(default=NANO, description="checkpoint, as for `perigee up`")
    lengths: tuple[int, ...] = Field(default=(2048, 4096, 8192, 16384), description="lengths in tokens, with an answer")
    trials: int = Field(default=50, ge=1, description="prompts of each length; what is asked for lies anywhere")
    facts: int = Field(default=4, ge=1, description="pass keys that each prompt states, one of which is asked for")
    text: Path | None = Field(default=None, description="text file, or directory of them [default: as `perigee train`]")
    moba: str = Field(default="", description="block-sparse attention, as for `perigee up` [default: the checkpoint's]")
    dtype: DType = Field(default="bfloat16", description="of weights and KVCache")
    loss_sequences: int = Field(default=16, ge=1, description="held-out sequences whose loss is measured")
    max_batched_tokens: int = Field(default=2048, ge=1, description="tokens a step computes at most")
    seed: int = Field(default=1, ge=0, description="seed of the prompts")
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: all cores")
    json_file: str = Field(default="", description="write the results as JSON to this file, - for standard output")


def run(config: RecallBenchConfig) -> int:
    """Measures, and shows the results. Raises BenchError for lengths or a checkpoint that it cannot measure with."""
    check_writable(json=config.json_file)
    if config.threads:
        torch.set_num_threads(config.threads)
    results = measure(config)
    if config.json_file != STDOUT:
        _print(results)
    publish_json(results, config.json_file)
    return 0


def measure(config: RecallBenchConfig) -> dict[str, Any]:
    """Recall by attention and length, and the held-out loss by attention."""
    directory = directory_of(config.model, "float32")
    model = load_config(directory, config.moba)
    _check(config, model)
    tokenizer = Tokenizer.load(directory)
    text = "".join(text for text in documents(config.text, SUFFICES) if is_held_out(text))
    needles = {
        length: list(
            haystacks(
                tokenizer,
                text,
                Random(f"{config.seed}/{length}"),
                length - ANSWER_TOKENS,
                config.facts,
                config.trials,
            )
        )
        for length in config.lengths
    }
    rows = token_rows(tokenizer, text, config.loss_sequences)
    recall: dict[str, dict[str, float]] = {}
    loss: dict[str, float] = {}
    for name, moba in _modes(model).items():
        engine = _engine(config, directory, replace(model, moba=moba))
        recall[name] = {str(length): _recall(engine, tokenizer, asked) for length, asked in needles.items()}
        if name != "moba_prefill":  # a loss is of prompts
            loss[name] = round(loss_of(engine, rows), 5)
    return {
        "recall": recall,
        "heldout_loss": loss,
        "trials": config.trials,
        "facts": config.facts,
        "dtype": config.dtype,
        "moba": model.moba.describe() if model.moba else None,
        "machine": describe(),
    }


def _check(config: RecallBenchConfig, model: ModelConfig) -> None:
    if model.moba is None:
        raise BenchError("--moba: the checkpoint says nothing of MoBA; needed is one such as block_size=128,top_k=4")
    if max(config.lengths) > model.max_context:
        raise BenchError(f"--lengths: {max(config.lengths)}; the model has {model.max_context} positions")
    if min(config.lengths) < SHORTEST:
        raise BenchError(f"--lengths: {min(config.lengths)}; allowed are {SHORTEST} or more")


def _modes(model: ModelConfig) -> Mapping[str, MobaConfig | None]:
    """Full attention; MoBA for prompts alone, as the paper serves; MoBA for outputs, too."""
    assert model.moba
    return {
        "full": None,
        "moba_prefill": replace(model.moba, decode="full"),
        "moba": replace(model.moba, decode="moba"),
    }


def _engine(config: RecallBenchConfig, directory: Path, model: ModelConfig) -> Engine:
    longest = max(*config.lengths, MEASURED_LENGTH)
    job = Job(directory, config.dtype, torch.get_num_threads(), Sizes((longest,), ()))
    return ours.load(job, model, config.max_batched_tokens)


def _recall(engine: Engine, tokenizer: Tokenizer, needles: Sequence[Needle]) -> float:
    """The share of prompts whose greedy continuation is the key."""
    answers = [tokenizer.decode(_answer(engine, needle.prompt)) for needle in needles]
    found = [answer.strip().startswith(needle.key) for needle, answer in zip(needles, answers, strict=True)]
    return round(mean(found), 4)


def _answer(engine: Engine, prompt: Sequence[int]) -> list[int]:
    sampling = Sampling(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    return engine.run_alone(TokenSequence(Ref("recall"), tuple(prompt), len(prompt), (), sampling))


def _print(results: Mapping[str, Any]) -> None:
    table = Table(title=f"pass keys found again, of {results['trials']}, {results['moba']}")
    lengths = list(results["recall"]["full"])
    for column in ("attention", *lengths, "held-out loss"):
        table.add_column(column, justify="right")
    for name, recall in results["recall"].items():
        loss = results["heldout_loss"].get(name)
        table.add_row(name, *(f"{recall[n]:.0%}" for n in lengths), "" if loss is None else f"{loss:.4f}")
    Console().print(table)
