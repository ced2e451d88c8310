"""`perigee replay-log FILE`: a recorded Conductor, lived through again by a fresh one."""

from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table

from perigee.output import STDOUT, check_writable, publish_json
from perigee.replay.relive import Difference, Reliving, relive
from perigee.scheduler.config import AdmissionName, PlacementName
from perigee.scheduler.errors import InvalidRecording
from perigee.scheduler.recording.eventlog import LogDecoder
from perigee.scheduler.recording.files import read_lines
from perigee.scheduler.shadow import Tally

Json = dict[str, object]


class ReplayLogConfig(BaseModel, frozen=True, extra="forbid"):
    """Tells a fresh Conductor what a recorded one heard, at the same times, and compares what they say.

    With other policies it also tells what those would have done with each request.
    """

    recording: Path = Field(description="a file that `perigee conductor --record` has written")
    placement: PlacementName | None = Field(None, description="policy to ask as well; without it: the recorded one")
    admission: AdmissionName | None = Field(None, description="policy to ask as well; without it: the recorded one")
    json_file: str | None = Field(None, description="write the result as JSON to this file; - is standard output")


def run(config: ReplayLogConfig) -> int:
    """Exit status 1 if the commands differ. Raises InvalidRecording, or ConfigurationError for the file of --json."""
    check_writable(json=config.json_file)
    lines = read_lines(config.recording)
    first = next(lines, None)
    if first is None:
        raise InvalidRecording(f"{config.recording}: has no header")
    decoder = LogDecoder(first)
    asked = {"placement": config.placement, "admission": config.admission}
    given = {kind: name for kind, name in asked.items() if name is not None}
    others = replace(decoder.header.policies, **given) if given else None
    result = relive(decoder.header, decoder.records(lines), others)
    if config.json_file != STDOUT:
        _print(result, Console())
    publish_json(as_json(result), config.json_file)
    return 0 if result.difference is None else 1


def as_json(result: Reliving) -> Json:
    return {
        "identical": result.difference is None,
        "policies": asdict(result.header.policies),
        "code_version": result.header.code_version,
        "events": dict(result.events),
        "commands": dict(result.commands),
        "span_s": result.span_s,
        "difference": _difference(result.difference) if result.difference else None,
        "others": {**asdict(result.others), **_tally(result.tally)} if result.others and result.tally else None,
    }


def _difference(difference: Difference) -> Json:
    return {
        "event_number": difference.number,
        "now": difference.record.now,
        "event": str(difference.record.event),
        "recorded": [str(command) for command in difference.record.commands],
        "now_said": [str(command) for command in difference.answer],
    }


def _tally(tally: Tally) -> Json:
    return {
        **asdict(tally),
        "agreement": tally.agreement,
        "mean_ttft_difference_s": tally.mean_ttft_difference_s,
    }


def _print(result: Reliving, console: Console) -> None:
    names = result.header.policies
    console.print(
        f"recorded: placement {names.placement}, admission {names.admission}, balance {names.balance},"
        f" {result.span_s:.1f} s"
    )
    if result.header.code_version != version("perigee"):
        console.print(f"recorded by version {result.header.code_version}, this is {version('perigee')}")
    console.print(_counts(result))
    if result.difference is None:
        console.print(f"identical: all {result.commands.total()} commands to {result.events.total()} events")
    else:
        for name, value in _difference(result.difference).items():
            console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
        console.print("different: the commands above are the first that differ")
    if result.others is not None and result.tally is not None:
        console.print(_comparison(f"{result.others.placement}, {result.others.admission}", result.tally))


def _counts(result: Reliving) -> Table:
    table = Table("heard", "events", "said", "commands")
    rows = max(len(result.events), len(result.commands))
    pad = [("", 0)]
    events, commands = result.events.most_common(), result.commands.most_common()
    events += pad * (rows - len(events))
    commands += pad * (rows - len(commands))
    for (event, heard), (command, said) in zip(events, commands, strict=True):
        table.add_row(event, str(heard or ""), command, str(said or ""))
    return table


def _comparison(names: str, tally: Tally) -> Table:
    both = tally.both_dispatched or 1
    table = Table(f"{names} would have", "", title="What other policies would have done with each arrival")
    table.add_row("done the same", f"{tally.agreement:.1%} of {tally.arrivals}")
    table.add_row("served too", str(tally.both_dispatched))
    table.add_row("  prefilled on the same worker", f"{tally.same_prefill / both:.1%}")
    table.add_row("  decoded on the same worker", f"{tally.same_decode / both:.1%}")
    table.add_row("  predicted a TTFT that differs by, in the mean", f"{tally.mean_ttft_difference_s:+.4f} s")
    table.add_row("rejected too", str(tally.both_rejected))
    table.add_row("rejected what was served", str(tally.rejections_made))
    table.add_row("served what was rejected", str(tally.rejections_avoided))
    table.add_row("rejected after prefill what went on", f"{tally.second_rejections_made} of {tally.second_checks}")
    table.add_row("let go on what was rejected after prefill", str(tally.second_rejections_avoided))
    return table
