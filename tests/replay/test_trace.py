"""Traces are read as they are, or refused with file, line, field and value."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from perigee.replay.errors import TraceError
from perigee.replay.trace import TraceRequest, parse_trace, read_trace, scale, speed_up

JSON_ROW = {"timestamp": 1500, "input_length": 700, "output_length": 30, "hash_ids": [3, 4]}
CSV_HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens"
AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def json_line(**changed: object) -> str:
    row: dict[str, object] = JSON_ROW | changed
    return json.dumps({key: value for key, value in row.items() if value != "absent"})


def test_reads_the_conversation_trace(mooncake_path: Path) -> None:
    trace = read_trace(mooncake_path)
    assert len(trace) == 12_031
    assert trace[0] == TraceRequest(0.0, 6758, 500, tuple(range(14)), 512)
    assert sum(request.input_tokens for request in trace) // len(trace) == 12_035
    assert sum(request.output_tokens for request in trace) // len(trace) == 342
    assert trace[-1].arrival_s == pytest.approx(3536.999)


def test_reads_the_azure_trace(azure_path: Path) -> None:
    trace = read_trace(azure_path)
    assert len(trace) == 19_366
    assert (trace[1].arrival_s, trace[1].input_tokens, trace[1].output_tokens) == (4.314579, 396, 109)


def test_arrivals_count_from_the_first_and_are_in_order() -> None:
    lines = [json_line(timestamp=9000), json_line(timestamp=8000), "\n", json_line(timestamp=8500)]
    assert [request.arrival_s for request in parse_trace(lines, "t")] == [0.0, 0.5, 1.0]


def test_without_ids_no_two_prompts_share_a_block() -> None:
    trace = parse_trace([CSV_HEADER, "0.5,513,1", "1.5,512,2"], "t")
    assert [request.prefix_ids for request in trace] == [(0, 1), (2,)]
    assert [request.arrival_s for request in trace] == [0.0, 1.0]


def test_azures_own_columns_are_read_and_arrivals_count_from_the_first() -> None:
    lines = [AZURE_HEADER, "2023-11-16 23:59:59.6805900,374,44", "2023-11-17 00:00:01.1805900,396,109"]
    trace = parse_trace(lines, "t")
    assert [(request.input_tokens, request.output_tokens) for request in trace] == [(374, 44), (396, 109)]
    assert [request.arrival_s for request in trace] == [0.0, pytest.approx(1.5)]


def test_a_date_may_name_its_zone() -> None:
    lines = [AZURE_HEADER, "2024-05-10T12:00:00+00:00,1,1", "2024-05-10T14:00:02+02:00,1,1"]
    assert [request.arrival_s for request in parse_trace(lines, "t")] == [0.0, 2.0]


def test_a_bad_date_is_named() -> None:
    with pytest.raises(TraceError, match="t:2: TIMESTAMP: 'soon' given, allowed is a date and time such as"):
        parse_trace([AZURE_HEADER, "soon,1,1"], "t")


def test_csv_columns_may_come_in_any_order() -> None:
    (request,) = parse_trace(["num_decode_tokens, arrived_at, extra, num_prefill_tokens", "7, 0, x, 20"], "t")
    assert (request.input_tokens, request.output_tokens) == (20, 7)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (json_line(timestamp=-1), "t:2: timestamp: '-1' given, allowed is a number, 0 or more"),
        (json_line(timestamp="soon"), "t:2: timestamp: 'soon'"),
        (json_line(timestamp=10**400), "t:2: timestamp: '10+' given, allowed is a number, 0 or more"),
        (json_line(input_length=0), "t:2: input_length: '0' given, allowed is a whole number, 1 or more"),
        (json_line(input_length=1.5), "t:2: input_length: '1.5'"),
        (json_line(output_length=True), "t:2: output_length: 'True'"),
        (json_line(output_length="absent"), "t:2: field 'output_length' is missing"),
        (json_line(hash_ids=[1]), "t:2: hash_ids: '1 ids' given, allowed is 2, one per 512 input tokens"),
        (json_line(hash_ids=[1, -2]), r"t:2: hash_ids: '\[1, -2\]' given, allowed is a list of whole numbers"),
        (json_line(hash_ids=7), "t:2: hash_ids: '7'"),
        ("{", "t:2: not JSON"),
        ('{"timestamp": ' + "[" * 100_000, "t:2: not JSON"),
        ("[1]", "t:2: .* is not a JSON object"),
        ('{"timestamp": NaN, "input_length": 700, "output_length": 30, "hash_ids": [3, 4]}', "t:2: timestamp: 'nan'"),
    ],
)
def test_a_bad_json_line_is_named(line: str, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        parse_trace([json_line(), line], "t")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("inf,1,1", "t:3: arrived_at: 'inf'"),
        ("0,many,1", "t:3: num_prefill_tokens: 'many' given, allowed is a whole number"),
        ("0,1,0", "t:3: num_decode_tokens: '0'"),
        ("0,1", "t:3: field 'num_decode_tokens' is missing"),
    ],
)
def test_a_bad_csv_line_is_named(line: str, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        parse_trace([CSV_HEADER, "0,1,1", line], "t")


@pytest.mark.parametrize("lines", [[], ["\n"], [CSV_HEADER]])
def test_a_trace_without_a_request_is_refused(lines: list[str]) -> None:
    with pytest.raises(TraceError, match="t: no request in it"):
        parse_trace(lines, "t")


def test_another_format_is_refused_with_what_is_expected() -> None:
    with pytest.raises(TraceError, match=r"neither JSON lines nor CSV .*arrived_at.*: 'time,prompt'"):
        parse_trace(["time,prompt"], "t")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe{"), "not a text file in UTF-8"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    make(tmp_path / "trace")
    with pytest.raises(TraceError, match=f"trace: {said}"):
        read_trace(tmp_path / "trace")


def test_scaling_keeps_the_number_of_blocks() -> None:
    trace = parse_trace([json_line(input_length=length) for length in (513, 1023, 1024)], "t")
    scaled = scale(trace, 1 / 16)
    assert [request.block_tokens for request in scaled] == [32] * 3
    assert [request.input_tokens for request in scaled] == [33, 64, 64]
    assert [request.output_tokens for request in scaled] == [2] * 3


@pytest.mark.parametrize("length_scale", [0.3, 0.001])
def test_a_scale_that_cuts_a_block_unevenly_is_refused_with_the_nearest(length_scale: float) -> None:
    with pytest.raises(TraceError, match=r"length_scale: .* the nearest by (\S+)$") as refused:
        scale(parse_trace([json_line()], "t"), length_scale)
    scale(parse_trace([json_line()], "t"), float(str(refused.value).rsplit(" ", 1)[1]))


def test_speed_divides_the_arrivals() -> None:
    trace = parse_trace([json_line(timestamp=0), json_line(timestamp=8000)], "t")
    assert [request.arrival_s for request in speed_up(trace, 4)] == [0.0, 2.0]
