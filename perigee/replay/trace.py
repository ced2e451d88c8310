"""Request traces: who arrives when, with how many tokens, and sharing what with whom.

Three formats are read, told apart by their content: Mooncake's JSON lines (FAST '25: `timestamp` in ms, `input_length`,
`output_length`, and in `hash_ids` one id per 512-token block, equal ids being equal prefixes), the CSV of Azure's LLM
inference traces (`TIMESTAMP` as date and time, `ContextTokens`, `GeneratedTokens`), and the CSV that vidur made of it
(`arrived_at` in s, `num_prefill_tokens`, `num_decode_tokens`).
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count, islice
from pathlib import Path

from perigee.replay.errors import TraceError

BLOCK_TOKENS = 512
"""What one of Mooncake's `hash_ids` covers. Prompts without ids are cut into blocks of the same size."""

CSV_COLUMNS = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    `arrival_s` counts from the first arrival. `prefix_ids` names each block of `block_tokens` prompt tokens, the last
    block perhaps partial; two requests share the blocks that their ids share from the start on, and nothing else.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...]
    block_tokens: int


def read_trace(path: Path) -> tuple[TraceRequest, ...]:
    """All requests of the trace at `path`, in order of arrival. Raises TraceError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return parse_trace(lines, str(path))
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a text file in UTF-8: {error}") from error


def parse_trace(lines: Iterable[str], name: str) -> tuple[TraceRequest, ...]:
    """All requests of `lines`, in order of arrival, the first at 0 s; `name` is what errors call the file."""
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise TraceError(f"{name}: no request in it")
    requests = sorted(_reader(numbered[0][1], name)(numbered, name), key=lambda request: request.arrival_s)
    if not requests:
        raise TraceError(f"{name}: no request in it")
    first_s = requests[0].arrival_s
    return tuple(replace(request, arrival_s=request.arrival_s - first_s) for request in requests)


def scale(trace: Iterable[TraceRequest], length_scale: float) -> tuple[TraceRequest, ...]:
    """`trace` with all lengths times `length_scale`, rounded up, which keeps the number of blocks of every prompt.

    Raises TraceError unless a block comes out as a whole number of tokens, for else its sharing could not be kept.
    """
    return tuple(_scale_request(request, length_scale) for request in trace)


def speed_up(trace: Iterable[TraceRequest], speed: float) -> tuple[TraceRequest, ...]:
    """`trace` with its arrivals `speed` times as fast."""
    return tuple(replace(request, arrival_s=request.arrival_s / speed) for request in trace)


def _scale_request(request: TraceRequest, length_scale: float) -> TraceRequest:
    block_tokens = request.block_tokens * length_scale
    if block_tokens < 1 or block_tokens % 1:
        nearest = max(round(block_tokens), 1) / request.block_tokens
        raise TraceError(
            f"length_scale: {length_scale:g} makes a block of {request.block_tokens} tokens one of {block_tokens:g};"
            f" allowed are whole numbers of tokens, the nearest by {nearest!r}"
        )
    return replace(
        request,
        input_tokens=math.ceil(request.input_tokens * length_scale),
        output_tokens=math.ceil(request.output_tokens * length_scale),
        block_tokens=int(block_tokens),
    )


_Numbered = Iterable[tuple[int, str]]
_Reader = Callable[[_Numbered, str], Iterator[TraceRequest]]


def _reader(first_line: str, name: str) -> _Reader:
    if first_line.lstrip().startswith("{"):
        return _read_json_lines
    columns = {column.strip() for column in first_line.split(",")}
    for expected, arrival_s in ((CSV_COLUMNS, _Row.time), (AZURE_COLUMNS, _Row.date)):
        if columns.issuperset(expected):
            return partial(_read_csv, expected, arrival_s)
    raise TraceError(
        f"{name}: neither JSON lines nor CSV with the columns {', '.join(CSV_COLUMNS)} or {', '.join(AZURE_COLUMNS)}:"
        f" {first_line.strip()[:80]!r}"
    )


def _read_json_lines(lines: _Numbered, name: str) -> Iterator[TraceRequest]:
    for number, line in lines:
        row = _Row(f"{name}:{number}", _json_object(line, f"{name}:{number}"))
        input_tokens = row.positive("input_length")
        yield TraceRequest(
            arrival_s=row.time("timestamp") / 1000,
            input_tokens=input_tokens,
            output_tokens=row.positive("output_length"),
            prefix_ids=row.ids("hash_ids", num_blocks=_num_blocks(input_tokens)),
            block_tokens=BLOCK_TOKENS,
        )


def _read_csv(
    fields: tuple[str, str, str], arrival_s: Callable[["_Row", str], float], lines: _Numbered, name: str
) -> Iterator[TraceRequest]:
    """`fields` are the columns of arrival, which `arrival_s` reads, of prompt tokens and of output tokens."""
    arrival, prompt_tokens, output_tokens = fields
    (_, header), *rows = lines
    columns = [column.strip() for column in header.split(",")]
    unused_ids = count()
    for number, line in rows:
        values = [_number(value) for value in line.split(",")]
        row = _Row(f"{name}:{number}", dict(zip(columns, values, strict=False)))
        input_tokens = row.positive(prompt_tokens)
        yield TraceRequest(
            arrival_s=arrival_s(row, arrival),
            input_tokens=input_tokens,
            output_tokens=row.positive(output_tokens),
            # This trace does not say who shares what, so nobody shares anything: each block has an id of its own.
            prefix_ids=tuple(islice(unused_ids, _num_blocks(input_tokens))),
            block_tokens=BLOCK_TOKENS,
        )


def _num_blocks(input_tokens: int) -> int:
    return -(-input_tokens // BLOCK_TOKENS)


def _json_object(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise TraceError(f"{where}: {line.strip()[:80]!r} is not a JSON object")
    return row


def _number(text: str) -> object:
    """The number that `text` spells, or else `text` itself, for the checks to complain about."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()


@dataclass(frozen=True, slots=True)
class _Row:
    """A row's values, checked as they are taken out. `where` is file:line."""

    where: str
    values: dict[str, object]

    def time(self, field: str) -> float:
        value = self._take(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            raise self._error(field, value, "a number, 0 or more")
        return float(value)

    def date(self, field: str) -> float:
        """In seconds; one without a zone is taken for UTC, which cancels out: arrivals count from the first."""
        value = self._take(field)
        try:
            date = datetime.fromisoformat(str(value))
        except ValueError:
            raise self._error(field, value, "a date and time such as 2023-11-16 18:15:46.680590") from None
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()

    def positive(self, field: str) -> int:
        value = self._take(field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._error(field, value, "a whole number, 1 or more")
        return value

    def ids(self, field: str, num_blocks: int) -> tuple[int, ...]:
        value = self._take(field)
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            raise self._error(field, value, "a list of whole numbers, 0 or more")
        if len(value) != num_blocks:
            raise self._error(field, f"{len(value)} ids", f"{num_blocks}, one per {BLOCK_TOKENS} input tokens")
        return tuple(value)

    def _take(self, field: str) -> object:
        if field not in self.values:
            raise TraceError(f"{self.where}: field {field!r} is missing; there are {', '.join(map(repr, self.values))}")
        return self.values[field]

    def _error(self, field: str, value: object, allowed: str) -> TraceError:
        shown = value if isinstance(value, str) else repr(value)
        return TraceError(f"{self.where}: {field}: {shown[:80]!r} given, allowed is {allowed}")
