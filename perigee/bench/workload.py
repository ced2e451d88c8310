"""The engine's workload in benchmarks, and the figures that come of it."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from perigee.workers.engine.engine import Engine
from perigee.workers.engine.sequence import Ref, Sampling
from perigee.workers.engine.sequence import Sequence as EngineSequence

# Streams decode behind a short prompt, so that reading the weights is what is measured.
DECODE_PROMPT_TOKENS = 64
DECODE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Figures:
    """Tokens a second: prefill by prompt length, decode (of all streams together) by number of streams."""

    prefill: dict[int, float]
    decode: dict[int, float]

    def as_json(self) -> dict[str, Any]:
        return {
            "prefill_tokens_per_s": {str(size): round(rate, 1) for size, rate in self.prefill.items()},
            "decode_tokens_per_s": {str(size): round(rate, 1) for size, rate in self.decode.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Figures":
        prefill = {int(size): float(rate) for size, rate in data["prefill_tokens_per_s"].items()}
        decode = {int(size): float(rate) for size, rate in data["decode_tokens_per_s"].items()}
        return cls(prefill, decode)


def best(figures: Sequence[Figures]) -> Figures:
    """The best of several runs, size by size."""
    return Figures(
        {size: max(f.prefill[size] for f in figures) for size in figures[0].prefill},
        {size: max(f.decode[size] for f in figures) for size in figures[0].decode},
    )


def prompt(length: int, vocab_size: int, salt: int = 0) -> list[int]:
    """`length` ordinary tokens, the same at each call and others for another `salt`."""
    return [(7919 * (i + 1) + 104729 * salt) % (vocab_size - 100) + 50 for i in range(length)]


def measure_engine(engine: Engine, prefill: Iterable[int], decode: Iterable[int]) -> Figures:
    """Runs the engine's own steps, nothing cached. Decode leaves the prompts' steps out of the time."""
    vocab_size = engine.runner.model.config.vocab_size
    return measure(
        prefill,
        decode,
        lambda length: _prefill_s(engine, prompt(length, vocab_size)),
        lambda streams: _decode_s(engine, streams, vocab_size),
    )


def measure(
    prefill: Iterable[int], decode: Iterable[int], prefill_s: Callable[[int], float], decode_s: Callable[[int], float]
) -> Figures:
    """One round: each size twice, the better counts, so that nobody pays for first uses."""
    return Figures(
        {n: n / min(prefill_s(n), prefill_s(n)) for n in prefill},
        {n: n * (DECODE_TOKENS - 1) / min(decode_s(n), decode_s(n)) for n in decode},
    )


def _prefill_s(engine: Engine, token_ids: list[int]) -> float:
    _start(engine, [token_ids], max_tokens=1)
    started = time.perf_counter()
    _finish(engine)
    elapsed_s = time.perf_counter() - started
    _clear(engine)
    return elapsed_s


def _decode_s(engine: Engine, streams: int, vocab_size: int) -> float:
    _start(engine, [prompt(DECODE_PROMPT_TOKENS, vocab_size, salt) for salt in range(streams)], DECODE_TOKENS)
    while any(active.num_outputs == 0 for active in engine.batcher.active.values()):
        engine.step()
    started = time.perf_counter()
    _finish(engine)
    elapsed_s = time.perf_counter() - started
    _clear(engine)
    return elapsed_s


def _start(engine: Engine, prompts: list[list[int]], max_tokens: int) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for index, token_ids in enumerate(prompts):
        sequence = EngineSequence(Ref(str(index)), tuple(token_ids), len(token_ids), (), sampling)
        engine.batcher.add(sequence, one_token=False)
    for active in engine.batcher.admit():
        engine.ready(active, 0)


def _finish(engine: Engine) -> None:
    while engine.step():
        pass


def _clear(engine: Engine) -> None:
    for ref in list(engine.batcher.active):
        engine.batcher.remove(ref)
