"""Fields of a config.json, checked as they are read."""

from collections.abc import Mapping
from typing import Any

from perigee.workers.model.errors import UnsupportedModel


def positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer. Raises UnsupportedModel if it is something else, or absent without a default."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UnsupportedModel(f"config.json: {key}: {value!r} is not a positive integer")
    return value


def one_of(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> Any:
    """A value among `allowed`, the first of them if the key is absent. Raises UnsupportedModel for another."""
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise UnsupportedModel(
            f"config.json: {key}: {value!r} is not supported, only {', '.join(repr(one) for one in allowed)}"
        )
    return value
