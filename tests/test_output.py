"""Where results go: what cannot be written is refused before a command begins, and what can holds the JSON."""

import asyncio
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from perigee.cli import COMMANDS, Command
from perigee.configuration import ConfigurationError
from perigee.output import check_writable, publish_json

PUBLISHING = [command for command in COMMANDS if "json_file" in pkgutil.resolve_name(command.config).model_fields]


@pytest.mark.parametrize("place", ["missing/results.json", "folder", "file/results.json"])
def test_what_cannot_be_written_is_named_with_its_flag_and_what_is_allowed(place: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / place
    with pytest.raises(ConfigurationError) as caught:
        check_writable(json=str(path), html=tmp_path / "page.html", receipts_file=path)
    assert caught.value.problems == tuple(
        f"--{flag}: '{path}' cannot be written; allowed is a file in a folder that can"
        for flag in ("json", "receipts-file")
    )


def test_what_can_be_written_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "old.json"
    old.write_text("old")
    check_writable(json="new.json", html=None, record="", output=old, receipts_file="-")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_json_goes_to_the_file_to_standard_output_or_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for json_file in (str(tmp_path / "results.json"), "-", "", None):
        publish_json({"a": 1}, json_file)
    assert capsys.readouterr().out == (tmp_path / "results.json").read_text() == '{\n "a": 1\n}\n'


def test_a_disk_that_is_full_is_named() -> None:
    with pytest.raises(ConfigurationError, match="--json: '/dev/full' cannot be written: No space left on device"):
        publish_json({}, "/dev/full")


@pytest.mark.parametrize("command", PUBLISHING, ids=lambda command: command.name)
def test_every_command_that_publishes_json_checks_the_file_first(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else that it is given exists, which it would say if it looked."""
    monkeypatch.chdir(tmp_path)
    model: type[BaseModel] = pkgutil.resolve_name(command.config)
    needed = {name: "/nowhere/else" for name, field in model.model_fields.items() if field.is_required()}
    config = model.model_validate({**needed, "json_file": "/nowhere/results.json"})
    run = pkgutil.resolve_name(command.run)
    with pytest.raises(ConfigurationError, match=r"^--json: '/nowhere/results\.json' cannot be written; allowed is "):
        asyncio.run(run(config)) if inspect.iscoroutinefunction(run) else run(config)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def perigee(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "perigee", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_wrong_file_is_one_line_and_the_exit_code_of_a_wrong_flag() -> None:
    said = perigee("bench", "conductor", "--json=/nowhere/x.json")
    line = "perigee: --json: '/nowhere/x.json' cannot be written; allowed is a file in a folder that can\n"
    assert (said.returncode, said.stdout, said.stderr) == (2, "", line)


def test_json_on_standard_output_has_it_to_itself(tmp_path: Path) -> None:
    flags = ("--workers=4", "--blocks=2000", "--decisions=20")
    printed, kept = perigee("bench", "conductor", *flags, "--json=-"), tmp_path / "results.json"
    assert "decisions a second" in perigee("bench", "conductor", *flags, f"--json={kept}").stdout
    assert json.loads(printed.stdout).keys() == json.loads(kept.read_text()).keys()
