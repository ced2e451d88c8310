"""A recording reads back as what it was made of, to the last bit."""

import asyncio
import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.kvstore.blocks import BlockKey
from perigee.scheduler.commands import (
    Dispatch,
    Exclude,
    Proceed,
    Reject,
    RejectReason,
    Replicate,
    Resync,
    SetRole,
    Trim,
    WorkerAddress,
)
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.errors import InvalidRecording, SchedulerError
from perigee.scheduler.events import RequestArrived, Tick
from perigee.scheduler.ids import NodeId, WorkerId
from perigee.scheduler.policies import PolicyNames
from perigee.scheduler.recording import keybook
from perigee.scheduler.recording.eventlog import Header, LogDecoder, LogEncoder, Record
from perigee.scheduler.recording.files import Recorder, read_lines
from perigee.scheduler.recording.keybook import KeyReader, KeyWriter
from perigee.scheduler.slo import Slo
from perigee.workers.engine.sequence import Ref
from tests.scheduler.cluster import SERVER, keys
from tests.scheduler.test_storm import Recorded, storms

HEADER = Header(PolicyNames(), CostProfile(prefill_token_s=0.1 + 0.2), "1.2.3", 1e9 + 0.125, tenant_weights={"a": 0.1})
ADDRESS = WorkerAddress(WorkerId("p"), "unix:/p", "1")


def written(records: Sequence[Record]) -> list[str]:
    encoder = LogEncoder()
    return [
        encoder.header(HEADER),
        *(encoder.record(record.event, record.now, record.commands) for record in records),
    ]


def read(lines: Sequence[str]) -> list[Record]:
    return list(LogDecoder(lines[0]).records(lines[1:]))


def lived(storm: list[Recorded]) -> list[Record]:
    conductor = Conductor()
    return [Record(now, event, tuple(conductor.handle(event, now))) for event, now in storm]


@settings(max_examples=50, deadline=None)
@given(storms())
def test_a_storm_reads_back_as_it_was(storm: list[Recorded]) -> None:
    records = lived(storm)
    assert read(written(records)) == records


def test_every_command_reads_back_as_it_was() -> None:
    commands = (
        Dispatch(SERVER, Ref("r", 1, 2), ADDRESS, ADDRESS, "left", "", 0.1 + 0.2, 1e-17, rank=-3.5),
        Proceed(SERVER, Ref("r")),
        Reject(SERVER, Ref("r"), RejectReason.TOO_LARGE, "wäre zu groß", 1 / 3, math.inf),
        Resync(NodeId("n")),
        Exclude(WorkerId("w"), "2", "odd"),
        Replicate(NodeId("n"), NodeId("m"), keys(32)[0], keys(128)),
        Trim(NodeId("n"), keys(64)),
        SetRole(WorkerId("w"), "2", "decode"),
    )
    records = [Record(0.1, Tick(), commands)]
    assert read(written(records)) == records


def test_header_and_slos_read_back_as_they_were() -> None:
    request = RequestArrived(SERVER, Ref("r"), keys(70), 70, 5, 0.25, "anna", -1, Slo(math.inf, 0.3))
    lines = written([Record(5e-324, request, ())])
    assert LogDecoder(lines[0]).header == HEADER
    assert read(lines) == [Record(5e-324, request, ())]
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)


prompts = st.lists(st.lists(st.integers(0, 20).map(lambda n: BlockKey(bytes([n]) * 32)), max_size=8), max_size=12)


@given(prompts)
def test_keys_read_back_in_any_order_and_number(prompts: list[list[BlockKey]]) -> None:
    writer, reader = KeyWriter(), KeyReader()
    assert [reader.decode(writer.encode(prompt)) for prompt in prompts] == [tuple(prompt) for prompt in prompts]


def test_keys_read_back_when_numbers_have_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keybook, "MAX_KEYS", 10)
    writer, reader = KeyWriter(), KeyReader()
    for num_tokens in (64, 320, 640, 320, 64):
        assert reader.decode(writer.encode(keys(num_tokens))) == keys(num_tokens)


def test_a_known_prefix_takes_a_few_bytes() -> None:
    writer = KeyWriter()
    first = len(json.dumps(writer.encode(keys(256 * 32))))
    again = len(json.dumps(writer.encode(keys(257 * 32))))
    assert first > 256 * 32
    assert again < 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "line 1: '': is no JSON"),
        ("[1]", "line 1: is no header of an event log"),
        ('{"other": 1}', "line 1: is no header of an event log"),
        ('{"perigee_event_log": 2}', "perigee_event_log: is format 2, allowed is 1"),
    ],
)
def test_what_is_no_recording_of_this_format_is_refused(line: str, message: str) -> None:
    with pytest.raises(InvalidRecording, match=f"^{message}"):
        LogDecoder(line)


def changed(**fields: object) -> str:
    return json.dumps({**json.loads(LogEncoder().header(HEADER)), **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"Tick": [], "Tock": []}, "fields: has 'Tock', allowed are BlockEvents,"),
        ({"Joined": ["server", "ref", "mood"]}, "fields.Joined: has 'mood', allowed are server, ref"),
        ({"Joined": ["server"]}, "fields.Joined: lacks 'ref'"),
    ],
)
def test_a_recording_of_other_events_is_refused(fields: dict[str, list[str]], message: str) -> None:
    with pytest.raises(InvalidRecording, match=f"^{message}"):
        LogDecoder(changed(fields=fields))


def test_a_recording_with_another_cost_model_is_refused() -> None:
    with pytest.raises(InvalidRecording, match=r"other code than this has recorded it: .*phase_of_the_moon_s"):
        LogDecoder(changed(profile={"phase_of_the_moon_s": 1.0}))


def test_a_field_that_a_recording_does_not_know_yet_has_its_default() -> None:
    decoder = LogDecoder(changed(fields={"Finished": ["server", "ref"]}))
    (record,) = decoder.records(['[1.5,["Finished","s",["r",0,0]]]'])
    assert (record.now, record.event.output_tokens) == (1.5, 0)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[]",
        "[1.0]",
        '[1.0,["Tock"]]',
        '[1.0,["Tick",3]]',
        '[1.0,["Trim","n",[[0,4]]]]',
        '[1.0,["Trim","n",["AA"]]]',
    ],
)
def test_a_line_that_is_no_record_is_named(line: str) -> None:
    with pytest.raises(InvalidRecording, match="line 2: "):
        read([LogEncoder().header(HEADER), line])


# ---- files


def record(path: Path, records: Sequence[Record], max_bytes: int = 1 << 20) -> None:
    recorder = Recorder(path, HEADER, max_bytes)
    for each in records:
        recorder.take(each.event, each.now, each.commands)
    recorder.close()


TICKS = [Record(float(now), Tick(), ()) for now in range(100)]


def test_a_file_reads_back_and_is_plain_gzip(tmp_path: Path) -> None:
    record(tmp_path / "log", TICKS)
    lines = list(read_lines(tmp_path / "log"))
    assert read(lines) == TICKS
    assert gzip.decompress((tmp_path / "log").read_bytes()).decode().splitlines() == lines


async def test_what_was_flushed_is_there_while_the_recorder_lives(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log", HEADER, 1 << 20)
    writing = asyncio.create_task(recorder.run())
    for part in (TICKS[:50], TICKS[50:]):
        for each in part:
            recorder.take(each.event, each.now, each.commands)
        async with asyncio.timeout(60):
            while len(list(read_lines(tmp_path / "log"))) <= part[-1].now + 1:  # noqa: ASYNC110  # of a file
                await asyncio.sleep(0.01)
    assert read(list(read_lines(tmp_path / "log"))) == TICKS
    writing.cancel()
    recorder.close()


def test_whatever_is_cut_off_the_whole_lines_before_it_count(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record(path, TICKS[:50])
    whole = path.read_bytes()
    record(path, TICKS)
    for kept in range(len(whole), 0, -29):
        path.write_bytes(whole[:kept])
        lines = list(read_lines(path))
        assert not lines or read(lines) == TICKS[: len(lines) - 1]
    path.write_bytes(whole + gzip.compress(b"[50.0,")[:-3])
    assert read(list(read_lines(path))) == TICKS[:50]


def test_damage_is_no_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    record(path, TICKS)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    with pytest.raises(InvalidRecording, match="is damaged, or no recording"):
        list(read_lines(path))
    with pytest.raises(InvalidRecording, match="cannot be read: No such file"):
        list(read_lines(tmp_path / "missing"))


def test_a_recording_ends_before_it_is_larger_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    recorder = Recorder(path, HEADER, 3000)
    for now in range(100):
        for each in lived([(RequestArrived(SERVER, Ref("r"), keys(640, salt=now), 640, 1), float(now))]):
            recorder.take(each.event, each.now, each.commands)
        recorder.flush()
    recorder.close()
    assert 0 < path.stat().st_size <= 3000
    records = read(list(read_lines(path)))
    assert [each.now for each in records] == [float(now) for now in range(len(records))]
    assert 0 < len(records) < 100


def test_a_file_that_is_there_is_kept_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for count in (1, 2, 3):
        record(path, TICKS[:count])
    assert len(list(read_lines(path))) == 1 + 3
    assert len(list(read_lines(tmp_path / "log.1"))) == 1 + 2


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SchedulerError, match=r"record: .*missing/log' cannot be written: No such file"):
        Recorder(tmp_path / "missing" / "log", HEADER, 1 << 20)


def test_a_disk_that_is_full_ends_the_recording_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "perigee")
    recorder = Recorder(Path("/dev/full"), HEADER, 1 << 20)
    recorder.flush()
    recorder.take(Tick(), 1.0, ())
    recorder.close()
    assert "No space left on device" in caplog.text
