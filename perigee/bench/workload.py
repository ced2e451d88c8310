"""What every engine is made to do, ours and its peers', and the figures that come of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from perigee.kvstore.blocks import DType
from perigee.workers.model.checkpoint import resolve

Time = TypeVar("Time")

# Streams decode behind a short prompt, so that reading the weights is what is measured.
DECODE_PROMPT_TOKENS = 64
# A run that took longer than this is not repeated within a round: nothing that happens once matters to it.
REPEAT_BELOW_S = 2.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """What to measure: prompt lengths in tokens, and numbers of streams that decode together."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]

    def within(self, max_context: int) -> "Sizes":
        """Those for which prompt and output fit into the context."""
        decode = tuple(n for n in self.decode if DECODE_PROMPT_TOKENS + decode_tokens(n) <= max_context)
        return Sizes(tuple(n for n in self.prefill if n < max_context), decode)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KVCache at most, if each sequence fills whole blocks of up to 64."""
        streams = [n * (DECODE_PROMPT_TOKENS + decode_tokens(n) + 64) for n in self.decode]
        return max((*(n + 1 + 64 for n in self.prefill), *streams))


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured, and how: the same for everyone."""

    directory: Path
    dtype: DType
    threads: int
    sizes: Sizes


@dataclass(frozen=True, slots=True)
class DecodeTime:
    """Seconds until every stream had its first token, and from there to the last; how many tokens came then."""

    prompts_s: float
    rest_s: float
    rest_tokens: int

    @property
    def total_s(self) -> float:
        return self.prompts_s + self.rest_s


@dataclass(frozen=True, slots=True)
class Figures:
    """Tokens a second: prefill by prompt length, decode (of all streams together) by number of streams.

    `decode` leaves the prompts out; `decode_with_prompts` counts their time, as measurements from outside an engine do.
    """

    prefill: Mapping[int, float]
    decode: Mapping[int, float]
    decode_with_prompts: Mapping[int, float]

    @classmethod
    def of_times(cls, prefill_s: Mapping[int, float], decode: Mapping[int, DecodeTime]) -> "Figures":
        return cls(
            {n: n / seconds for n, seconds in prefill_s.items()},
            {n: time.rest_tokens / time.rest_s for n, time in decode.items()},
            {n: n * decode_tokens(n) / time.total_s for n, time in decode.items()},
        )

    @classmethod
    def of_phases(cls, rates: Callable[[str], Mapping[int, float]]) -> "Figures":
        """What `rates` says for the name of each field."""
        return cls(*map(rates, PHASES))

    @classmethod
    def from_json(cls, data: Mapping[str, Mapping[str, float]]) -> "Figures":
        return cls.of_phases(lambda phase: {int(n): float(rate) for n, rate in data[json_key(phase)].items()})

    def phase(self, name: str) -> Mapping[int, float]:
        """The field of this name."""
        rates: Mapping[int, float] = getattr(self, name)
        return rates

    def as_json(self, digits: int = 1) -> dict[str, dict[str, float]]:
        return {
            json_key(phase): {str(n): round(rate, digits) for n, rate in self.phase(phase).items()} for phase in PHASES
        }


PHASES = tuple(field.name for field in fields(Figures))


def json_key(phase: str) -> str:
    return f"{phase}_tokens_per_s"


def decode_tokens(streams: int) -> int:
    """Output tokens of each stream: fewer where there are many, which take long."""
    return 128 if streams <= 8 else 64


def best(runs: Sequence[Figures]) -> Figures:
    """The best of several runs, size by size."""
    return Figures.of_phases(lambda phase: _best([run.phase(phase) for run in runs]))


def prompt(length: int, vocab_size: int, salt: int = 0) -> list[int]:
    """`length` ordinary tokens, the same at each call and others for another `salt`."""
    return [(7919 * (i + 1) + 104729 * salt) % (vocab_size - 100) + 50 for i in range(length)]


def measure(sizes: Sizes, prefill_s: Callable[[int], float], decode_time: Callable[[int], DecodeTime]) -> Figures:
    """One round: each size twice unless it takes long, the better counts, so that nobody pays for first uses."""
    prefill = {n: min(_runs(prefill_s, n, float)) for n in sizes.prefill}
    decode = {n: min(_runs(decode_time, n, _total_s), key=_total_s) for n in sizes.decode}
    return Figures.of_times(prefill, decode)


def _runs(run: Callable[[int], Time], size: int, seconds: Callable[[Time], float]) -> Iterable[Time]:
    first = run(size)
    yield first
    if seconds(first) < REPEAT_BELOW_S:
        yield run(size)


def _total_s(time: DecodeTime) -> float:
    return time.total_s


def _best(rates: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {size: max(run[size] for run in rates) for size in rates[0]}


def directory_of(model: str, dtype: DType) -> Path:
    """A checkpoint's directory, as `perigee up` finds it; but other than for serving, it needs no tokenizer."""
    path = Path(model).expanduser()
    return path.resolve() if (path / "config.json").is_file() else resolve(model, dtype)
