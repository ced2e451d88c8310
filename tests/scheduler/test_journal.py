"""What a Conductor's process writes down, and how it is told to."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import ValidationError

from perigee.scheduler.config import ConductorConfig
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.errors import SchedulerError
from perigee.scheduler.events import Tick
from perigee.scheduler.policies import PolicyNames, parse_policies
from perigee.scheduler.receipts import Receipt
from perigee.scheduler.recording.files import read_lines
from perigee.scheduler.recording.journal import Journal
from tests.scheduler.cluster import one_of_each


def some_ended(count: int = 2) -> list[Receipt]:
    cluster = one_of_each()
    for index in range(count):
        cluster.dispatch(f"r{index}")
        cluster.finish(f"r{index}")
    return cluster.conductor.receipts.take_ended()


async def test_receipts_go_to_their_file_a_line_each_and_nowhere_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "receipts"
    async with Journal.opened(ConductorConfig(receipts_file=path), CostProfile()) as journal:
        journal.log(some_ended())
    assert [json.loads(line)["request_id"] for line in path.read_text().splitlines()] == ["r0", "r1"]
    assert "perigee.receipts" not in {record.name for record in caplog.records}


async def test_without_a_file_they_are_in_the_log_at_level_debug_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with Journal.opened(ConductorConfig(), CostProfile()) as journal:
        caplog.set_level(logging.INFO)
        journal.log(some_ended())
        caplog.set_level(logging.DEBUG, "perigee.receipts")
        journal.log(some_ended(1))
    (record,) = (record for record in caplog.records if record.name == "perigee.receipts")
    assert json.loads(record.getMessage())["request_id"] == "r0"


async def test_a_recording_begins_with_what_decided(tmp_path: Path) -> None:
    path = tmp_path / "log"
    config = ConductorConfig(
        record=path, placement="random", admission="early", balance="none", tenant_weights=("gold=4",)
    )
    async with Journal.opened(config, CostProfile(prefill_token_s=0.125)) as journal:
        journal.note(Tick(), 5.0, [])
    header, tick = (json.loads(line) for line in read_lines(path))
    assert header["policies"] == asdict(PolicyNames("random", "early", "none"))
    assert header["profile"]["prefill_token_s"] == 0.125
    assert header["tenant_weights"] == {"gold": 4.0}
    assert tick == [5.0, ["Tick"]]


@pytest.mark.parametrize("field", ["receipts_file", "record"])
async def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, field: str) -> None:
    config = ConductorConfig.model_validate({field: tmp_path / "missing" / "file"})
    with pytest.raises(SchedulerError, match=f"{field}: .*missing/file' cannot be written: No such file"):
        async with Journal.opened(config, CostProfile()):
            pass


def test_a_shadow_is_named_by_its_policies() -> None:
    assert parse_policies("placement=random,admission=early") == PolicyNames("random", "early")
    assert parse_policies("admission=none") == PolicyNames("perigee", "none")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shadow", "random", "'random': allowed are placement=NAME and admission=NAME"),
        ("shadow", "placement=lucky", "placement: 'lucky': allowed are .*, random"),
        ("shadow", "", "'': allowed are placement=NAME and admission=NAME"),
        ("tenant_weights", ("gold=0",), "tenant_weights\\n.*'gold=0': allowed is NAME=WEIGHT"),
        ("placement", "lucky", "allowed are .*, random"),
        ("admission", "maybe", "allowed are .*, early"),
    ],
)
def test_policies_that_are_not_there_are_refused_with_those_that_are(field: str, value: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ConductorConfig.model_validate({field: value})
