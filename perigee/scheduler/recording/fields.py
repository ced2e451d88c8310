"""How the fields of events and commands are written in a recording, from their declared types.

A field that is added to an event or command is thereby recorded, without a word here.
"""

import math
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from operator import attrgetter
from typing import Any, get_args, get_origin, get_type_hints

from perigee.kvstore.blocks import BlockKey
from perigee.scheduler.recording.keybook import KeyReader, KeyWriter

Encoder = Callable[[Any], Any]
Decoder = Callable[[Any], Any]


def encoder(kind: type, keys: KeyWriter) -> Encoder:
    """Turns values of the dataclass `kind` into lists of their fields, in order, which JSON can say."""
    hints = get_type_hints(kind)
    names = [each.name for each in fields(kind)]
    encoders = [_encoder(hints[name], keys) for name in names]
    if len(names) < 2:  # of one, an attrgetter makes no tuple
        return lambda value: [encode(getattr(value, name)) for name, encode in zip(names, encoders, strict=True)]
    values_of = attrgetter(*names)
    # Most fields are said as they are: only the others cost a call.
    others = [(index, encode) for index, encode in enumerate(encoders) if encode is not _same]

    def encode_value(value: Any) -> list[Any]:
        values = list(values_of(value))
        for index, encode in others:
            values[index] = encode(values[index])
        return values

    return encode_value


def decoder(kind: type, field: str, keys: KeyReader) -> Decoder:
    """The inverse. What it gives raises ValueError, TypeError or IndexError for what is no such value."""
    return _decoder(get_type_hints(kind)[field], keys)


def is_optional(field: Field[Any]) -> bool:
    """Whether a value can be made without it."""
    return field.default is not MISSING or field.default_factory is not MISSING


def _encoder(hint: Any, keys: KeyWriter) -> Encoder:
    if hint is BlockKey:
        return lambda key: keys.encode((key,))
    if get_origin(hint) is tuple:
        return keys.encode if _item(hint) is BlockKey else _tuple_encoder(_encoder(_item(hint), keys))
    base = _base(hint)
    if is_dataclass(base):
        return encoder(base, keys)
    if base is bytes:
        return lambda data: b64encode(data).decode()
    if base is float:
        return _finite
    if issubclass(base, Enum):
        return lambda member: member.value
    return _plain(base)


def _decoder(hint: Any, keys: KeyReader) -> Decoder:
    if hint is BlockKey:
        return lambda runs: keys.decode(runs)[0]
    if get_origin(hint) is tuple:
        return keys.decode if _item(hint) is BlockKey else _tuple_decoder(_decoder(_item(hint), keys))
    base = _base(hint)
    if is_dataclass(base):
        hints = get_type_hints(base)
        return _value_decoder(base, [_decoder(hints[each.name], keys) for each in fields(base)])
    if base is bytes:
        return b64decode
    if base is float:
        return lambda number: float(number) if isinstance(number, str) else number
    if issubclass(base, Enum):
        return base
    return _plain(base)


def _tuple_encoder(encode: Encoder) -> Encoder:
    return lambda values: [encode(value) for value in values]


def _tuple_decoder(decode: Decoder) -> Decoder:
    return lambda values: tuple([decode(value) for value in values])


def _value_decoder(kind: Callable[..., Any], decoders: list[Decoder]) -> Decoder:
    return lambda values: kind(*[decode(value) for decode, value in zip(decoders, values, strict=True)])


def _plain(base: type) -> Callable[[Any], Any]:
    """JSON says it as it is."""
    if base not in (bool, int, str):
        raise TypeError(f"{base}: no way to record it is known")
    return _same


def _same(value: Any) -> Any:
    return value


def _finite(number: float) -> float | str:
    """JSON knows no infinity."""
    return number if math.isfinite(number) else str(number)


def _item(hint: Any) -> Any:
    """Of a `tuple[X, ...]`."""
    item, *rest = get_args(hint)
    if rest != [...]:
        raise TypeError(f"{hint}: no way to record it is known")
    return item


def _base(hint: Any) -> type:
    """The type behind a NewType."""
    base = getattr(hint, "__supertype__", hint)
    if not isinstance(base, type):
        raise TypeError(f"{hint}: no way to record it is known")
    return base
