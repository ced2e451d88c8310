"""A recording of a Conductor, lived through again by a fresh one: does it say the same, and what would others say?"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from perigee.scheduler.commands import Command
from perigee.scheduler.conductor import Conductor
from perigee.scheduler.errors import InvalidRecording
from perigee.scheduler.policies import ADMISSIONS, BALANCES, PLACEMENTS, Policies, PolicyNames, make_policies
from perigee.scheduler.recording.eventlog import Header, Record
from perigee.scheduler.shadow import Shadow, Tally


@dataclass(frozen=True, slots=True)
class Difference:
    """The first event that was answered otherwise. `number` counts from 1."""

    number: int
    record: Record
    answer: tuple[Command, ...]


@dataclass(slots=True)
class Reliving:
    """How it went, up to the first difference if there is one. `relive` fills it."""

    header: Header
    events: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    span_s: float = 0.0
    difference: Difference | None = None
    others: PolicyNames | None = None
    tally: Tally | None = None  # of what the others would have done


def relive(header: Header, records: Iterable[Record], others: PolicyNames | None = None) -> Reliving:
    """Tells a fresh Conductor, with the policies that the recorded one had, what that one heard, at the same times.

    `others` are asked about each request on the way. So each of their decisions is about the cluster as it was, not as
    it would have become. Raises InvalidRecording.
    """
    shadow = Shadow(_policies(others, header.role_hold_s)) if others is not None else None
    policies = _policies(header.policies, header.role_hold_s)
    conductor = Conductor(policies, header.profile, shadow, num_receipts=1, tenant_weights=header.tenant_weights)
    result = Reliving(header, others=others, tally=shadow.tally if shadow else None)
    begin: float | None = None
    for number, record in enumerate(records, 1):
        begin = record.now if begin is None else begin
        answer = tuple(conductor.handle(record.event, record.now))
        result.span_s = record.now - begin
        result.events[type(record.event).__name__] += 1
        result.commands.update(type(command).__name__ for command in record.commands)
        if answer != record.commands:
            result.difference = Difference(number, record, answer)
            break
    return result


def _policies(names: PolicyNames, role_hold_s: float) -> Policies:
    for kind, name, allowed in (
        ("placement", names.placement, PLACEMENTS.keys()),
        ("admission", names.admission, ADMISSIONS.keys()),
        ("balance", names.balance, BALANCES.keys()),
    ):
        if name not in allowed:
            raise InvalidRecording(f"policies.{kind}: is {name!r}, allowed are {', '.join(sorted(allowed))}")
    return make_policies(names.placement, names.admission, names.balance, role_hold_s)
