"""What a Conductor heard and said, as lines of text that read back as exactly the same values.

The first line is the Header, every other one a Record: `[time, event, command, …]`, where events and commands are
`["Name", field, …]` in the order that the header's `fields` gives for the name. Floats are written so that they read
back the same; an infinite one is a string.

Block keys are what there is most of, and most of them come again: in the next turn of a conversation, in a store
node's events. So each is written once, and numbered; from then on `[first, count]` stands for as many keys of
consecutive numbers, which is what a known prefix is. Both sides forget all numbers when there are MAX_KEYS.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

from perigee.scheduler.balance.roles import DEFAULT_HOLD_S
from perigee.scheduler.commands import Command
from perigee.scheduler.cost import CostProfile
from perigee.scheduler.errors import InvalidRecording
from perigee.scheduler.events import Event
from perigee.scheduler.policies import PolicyNames
from perigee.scheduler.recording.fields import Decoder, decoder, encoder, is_optional
from perigee.scheduler.recording.keybook import KeyReader, KeyWriter

FORMAT = 1

_TYPES: dict[str, type] = {kind.__name__: kind for kind in (*get_args(Event), *get_args(Command))}


@dataclass(frozen=True, slots=True)
class Header:
    """Whose recording it is: all that decides what a Conductor says, besides what it hears. `unix_offset_s` turns the
    recorded times into Unix time.
    """

    policies: PolicyNames
    profile: CostProfile
    code_version: str
    unix_offset_s: float = 0.0
    role_hold_s: float = DEFAULT_HOLD_S
    tenant_weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """One event, when the Conductor heard it, and what it said."""

    now: float
    event: Event
    commands: tuple[Command, ...]


class LogEncoder:
    """Writes one recording, in order."""

    def __init__(self) -> None:
        keys = KeyWriter()
        self._encoders = {kind: (name, encoder(kind, keys)) for name, kind in _TYPES.items()}
        self._json = json.JSONEncoder(separators=(",", ":"), allow_nan=False)

    def header(self, header: Header) -> str:
        """The first line."""
        described = {
            "perigee_event_log": FORMAT,
            **asdict(header),
            "fields": {name: [each.name for each in fields(kind)] for name, kind in _TYPES.items()},
        }
        return json.dumps(described) + "\n"

    def record(self, event: Event, now: float, commands: Iterable[Command]) -> str:
        """The next line."""
        values = [now, self._value(event), *map(self._value, commands)]
        return self._json.encode(values) + "\n"

    def _value(self, value: Event | Command) -> list[Any]:
        name, encode = self._encoders[type(value)]
        return [name, *encode(value)]


class LogDecoder:
    """Reads one recording, in order. Raises InvalidRecording for what is none, or needs other code than this."""

    def __init__(self, first_line: str) -> None:
        described = _json(first_line, 1)
        _check_format(described)
        self.header = _header(described)
        self._keys = KeyReader()
        self._decoders = {name: self._of(name, names) for name, names in described["fields"].items()}

    def records(self, lines: Iterable[str]) -> Iterator[Record]:
        """The records of all lines but the first."""
        for number, line in enumerate(lines, 2):
            values = _json(line, number)
            try:
                now, event, *commands = values
                yield Record(now, self._value(event), tuple(map(self._value, commands)))
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise InvalidRecording(f"line {number}: {line[:80]!r}: is no record: {error}") from error

    def _of(self, name: str, names: list[str]) -> tuple[type, list[tuple[str, Decoder]]]:
        kind = _TYPES.get(name)
        if kind is None:
            raise InvalidRecording(f"fields: has {name!r}, allowed are {', '.join(sorted(_TYPES))}")
        known = {each.name: each for each in fields(kind)}
        if unknown := [each for each in names if each not in known]:
            raise InvalidRecording(f"fields.{name}: has {unknown[0]!r}, allowed are {', '.join(known)}")
        if missing := [each for each in known if each not in names and not is_optional(known[each])]:
            raise InvalidRecording(f"fields.{name}: lacks {missing[0]!r}: other code than this has recorded it")
        return kind, [(each, decoder(kind, each, self._keys)) for each in names]

    def _value(self, values: list[Any]) -> Any:
        name, *rest = values
        kind, decoders = self._decoders[name]
        return kind(**{field: decode(value) for (field, decode), value in zip(decoders, rest, strict=True)})


def _json(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InvalidRecording(f"line {number}: {line[:80]!r}: is no JSON") from error


def _check_format(described: Any) -> None:
    found = described.get("perigee_event_log") if isinstance(described, dict) else None
    if found is None:
        raise InvalidRecording("line 1: is no header of an event log")
    if found != FORMAT:
        raise InvalidRecording(f"perigee_event_log: is format {found!r}, allowed is {FORMAT}")


def _header(described: dict[str, Any]) -> Header:
    try:
        return Header(
            PolicyNames(**described["policies"]),
            CostProfile(**described["profile"]),
            str(described["code_version"]),
            float(described["unix_offset_s"]),
            float(described.get("role_hold_s", DEFAULT_HOLD_S)),
            {str(tenant): float(weight) for tenant, weight in described.get("tenant_weights", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidRecording(f"line 1: other code than this has recorded it: {error}") from error
