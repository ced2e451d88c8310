"""One frozen configuration a process: defaults, then perigee.yaml, then the environment, then flags.

A command called `store` reads the section `store` of the file, `PERIGEE_STORE_DRAM_BYTES` and `--dram-bytes`. All three
are generated from the fields of the command's pydantic model, which validates what they say together.

Fields of type SecretStr are secrets: they come from the environment alone, or from a file that it names. All commands
share them, so `cluster_secret` is `PERIGEE_CLUSTER_SECRET` or `PERIGEE_CLUSTER_SECRET_FILE`.
"""

import argparse
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ByteSize, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

DEFAULT_FILE = Path("perigee.yaml")

Config = TypeVar("Config", bound=BaseModel)


class ConfigurationError(Exception):
    """What is wrong with a configuration, one problem a line: where it was said, the value, what is allowed."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class FlagParser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError([f"{message}; see {self.prog} --help"])


def add_flags(parser: argparse.ArgumentParser, model: type[BaseModel], positional: Collection[str] = ()) -> None:
    """A flag for each field of `model`, or an argument for those in `positional`. What is not given stays unset.

    The help tells of secrets as well, which have no flags.
    """
    for name, field in model.model_fields.items():
        if _is_secret(field):
            parser.add_argument_group(_secret_variables(name), field.description)
            continue
        text = f"{field.description} {_default_text(field)}".replace("%", "%%")
        if name in positional:
            parser.add_argument(name, metavar=name.upper(), help=text)
        elif field.annotation is bool:
            parser.add_argument(
                _flag(name), dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            parser.add_argument(
                _flag(name), dest=name, metavar=_metavar(field.annotation), default=argparse.SUPPRESS, help=text
            )


def load(
    model: type[Config],
    *,
    command: str,
    file: Path | None,
    sections: Collection[str],
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    positional: Collection[str] = (),
) -> Config:
    """The configuration of `command`. `file` None means perigee.yaml where there is one. Raises ConfigurationError."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, value in _from_file(file, command, sections).items():
        values[name], origins[name] = value, f"{file or DEFAULT_FILE}: {command}.{name}"
    for name, field in model.model_fields.items():
        if _is_secret(field):
            values[name], origins[name] = _secret(name, environ, origins.get(name))
            continue
        variable = f"PERIGEE_{command}_{name}".upper().replace("-", "_")
        if variable in environ:
            values[name], origins[name] = environ[variable], variable
        if name in flags:
            values[name], origins[name] = flags[name], name.upper() if name in positional else _flag(name)
        if get_origin(field.annotation) is tuple and isinstance(values.get(name), str):
            values[name] = values[name].split(",") if values[name] else ()
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explained(error, model, origins) from error


def explained(error: ValidationError, model: type[BaseModel], origins: Mapping[str, str]) -> ConfigurationError:
    """What is wrong with a `model`. `origins` says for each field where its value came from, if not from its flag."""
    return ConfigurationError([_problem(problem, model, origins) for problem in error.errors()])


def as_flags(config: BaseModel) -> list[str]:
    """The command line that gives `config` again. None is left out: it is said by saying nothing. Secrets are, too."""
    given = ((name, value) for name, value in config if not isinstance(value, SecretStr | None))
    return [_as_flag(_flag(name), value) for name, value in given]


def _as_flag(flag: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    return f"{flag}={_shown(value)}"


def _shown(value: Any) -> str:
    """As one says it in a flag."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _flag(name: str) -> str:
    """`dram_bytes` is --dram-bytes; `json_file` is --json, a name that fields of pydantic models cannot have."""
    return "--json" if name == "json_file" else "--" + name.replace("_", "-")


def _from_file(file: Path | None, command: str, sections: Collection[str]) -> dict[str, Any]:
    if file is None and not DEFAULT_FILE.is_file():
        return {}
    path = file or DEFAULT_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError([f"--config: {path}: {' '.join(str(error).split())}"]) from error
    allowed = f"allowed are the sections {', '.join(sorted(sections))}"
    if not isinstance(content, dict):
        raise ConfigurationError([f"{path}: holds a {type(content).__name__}; {allowed}"])
    if unknown := [str(name) for name in content if name not in sections]:
        raise ConfigurationError([f"{path}: {name}: no such section; {allowed}" for name in unknown])
    section = content.get(command) or {}
    if not isinstance(section, dict):
        raise ConfigurationError([f"{path}: {command}: holds a {type(section).__name__}, expected fields"])
    return {str(name).replace("-", "_"): value for name, value in section.items()}


def _is_secret(field: FieldInfo) -> bool:
    return SecretStr in (field.annotation, *get_args(field.annotation))


def _secret_variables(name: str) -> str:
    return f"PERIGEE_{name} or PERIGEE_{name}_FILE".upper().replace(" OR ", " or ")


def _secret(name: str, environ: Mapping[str, str], in_settings: str | None) -> tuple[str | None, str]:
    """A secret, without the white space around it, and where it was said. Raises ConfigurationError."""
    variable = f"PERIGEE_{name}".upper()
    in_file = f"{variable}_FILE"
    if in_settings:
        raise ConfigurationError([f"{in_settings}: is a secret; allowed is {_secret_variables(name)}"])
    if variable in environ and in_file in environ:
        raise ConfigurationError([f"{in_file}: there is {variable} as well; allowed is one of the two"])
    if in_file not in environ:
        return environ.get(variable), variable
    try:
        return Path(environ[in_file]).read_text(encoding="utf-8").strip(), in_file
    except (OSError, ValueError) as error:
        raise ConfigurationError([f"{in_file}: {environ[in_file]!r}: {error}"]) from error


def _problem(problem: ErrorDetails, model: type[BaseModel], origins: Mapping[str, str]) -> str:
    if not problem["loc"]:
        # A rule about several fields: its message names them.
        return problem["msg"].removeprefix("Value error, ")
    name = str(problem["loc"][0])
    origin = origins.get(name, _flag(name))
    if problem["type"] == "missing":
        return f"{origin}: is needed: {model.model_fields[name].description}"
    if problem["type"] == "extra_forbidden":
        return f"{origin}: no such field; allowed are {', '.join(model.model_fields)}"
    reason = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "tuple_type":
        reason = "allowed is a list, or a text with commas between its values"
    if _is_secret(model.model_fields[name]):
        return f"{origin}: {reason}"
    return f"{origin}: {problem['input']!r}: {reason}"


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "[required]"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default in (None, "", ()):
        return ""
    if isinstance(default, bool):
        return f"[default: {'yes' if default else 'no'}]"
    return f"[default: {default.human_readable() if isinstance(default, ByteSize) else _shown(default)}]"


def _metavar(annotation: Any) -> str:
    """What to write after a flag, from its type: `int | None` is a number as `int` is."""
    if get_origin(annotation) in (Union, types.UnionType):
        return _metavar(next(option for option in get_args(annotation) if option is not type(None)))
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, get_args(annotation))) + "}"
    if get_origin(annotation) is tuple:
        return f"{_metavar(get_args(annotation)[0])},…"
    names = {int: "N", float: "X", Path: "PATH", ByteSize: "SIZE"}
    return names.get(annotation, "TEXT")
