"""Perigee's engine under the benchmarks' workload: its own steps, in this process, nothing cached."""

import time
from pathlib import Path

from perigee.bench.workload import (
    DECODE_PROMPT_TOKENS,
    DecodeTime,
    Figures,
    Job,
    Sizes,
    decode_tokens,
    measure,
    prompt,
)
from perigee.workers.config import WorkerConfig
from perigee.workers.engine.engine import Engine
from perigee.workers.engine.sequence import Ref, Sampling, Sequence
from perigee.workers.loading import load_engine
from perigee.workers.model.config import ModelConfig

# Of one step: what vLLM is given here, too.
MAX_BATCHED_TOKENS = 4096


def load(job: Job, model: ModelConfig, max_batched_tokens: int = MAX_BATCHED_TOKENS) -> Engine:
    """An engine with a worker's settings and as much KVCache as the job needs."""
    worker = WorkerConfig(
        id="bench",
        role="decode",  # which admits all prompts at once
        model=str(job.directory),
        store=Path("/nonexistent"),  # neither this nor the directory is ever opened
        directory="unix:/nonexistent",
        dtype=job.dtype,
        threads=job.threads,
        kv_tokens=job.sizes.kv_tokens,
        max_batched_tokens=max_batched_tokens,
        max_sequences=max((1, *job.sizes.decode)),
    )
    return load_engine(job.directory, model, worker)


def measure_engine(engine: Engine, sizes: Sizes) -> Figures:
    """One round."""
    return measure(sizes, lambda length: prefill_s(engine, length), lambda streams: _decode_time(engine, streams))


def prefill_s(engine: Engine, length: int) -> float:
    """Seconds from the first step of a prompt of `length` tokens to its last."""
    _add(engine, [prompt(length, _vocab_size(engine))], max_tokens=1)
    started = time.perf_counter()
    _finish(engine)
    elapsed_s = time.perf_counter() - started
    _clear(engine)
    return elapsed_s


def _decode_time(engine: Engine, streams: int) -> DecodeTime:
    vocab_size = _vocab_size(engine)
    _add(engine, [prompt(DECODE_PROMPT_TOKENS, vocab_size, n) for n in range(streams)], decode_tokens(streams))
    started = time.perf_counter()
    while any(active.num_outputs == 0 for active in engine.batcher.active.values()):
        engine.step()
    first_s, first_tokens = time.perf_counter(), engine.totals.output_tokens
    _finish(engine)
    ended_s = time.perf_counter()
    _clear(engine)
    return DecodeTime(first_s - started, ended_s - first_s, engine.totals.output_tokens - first_tokens)


def _vocab_size(engine: Engine) -> int:
    return engine.runner.model.config.vocab_size


def _add(engine: Engine, prompts: list[list[int]], max_tokens: int) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for index, token_ids in enumerate(prompts):
        sequence = Sequence(Ref(str(index)), tuple(token_ids), len(token_ids), (), sampling)
        engine.batcher.add(sequence, one_token=False)
    for active in engine.batcher.admit():
        engine.ready(active, 0)


def _finish(engine: Engine) -> None:
    while engine.step():
        pass


def _clear(engine: Engine) -> None:
    for ref in list(engine.batcher.active):
        engine.batcher.remove(ref)
