"""The files that a command leaves its results in. Where JSON is asked for, `-` is standard output."""

import json
import os
import sys
from pathlib import Path

from perigee.configuration import ConfigurationError

STDOUT = "-"


def check_writable(**files: str | Path | None) -> None:
    """Better known before minutes of work than after them. Makes no file, and opens none.

    `files` are by the name of their flag, `json` for --json; one that is not asked for is None or empty. Raises
    ConfigurationError.
    """
    asked = {name: file for name, file in files.items() if file and file != STDOUT}
    allowed = "; allowed is a file in a folder that can"
    if problems := [_problem(name, file, allowed) for name, file in asked.items() if not _is_writable(Path(file))]:
        raise ConfigurationError(problems)


def publish_json(content: object, json_file: str | None, indent: int = 1) -> None:
    """To the file, to standard output for `-`, or not at all. Raises ConfigurationError as `publish` does."""
    publish(json.dumps(content, indent=indent) + "\n", "json", json_file)


def publish(text: str, name: str, file: str | Path | None) -> None:
    """To the file that the flag `name` names, to standard output for `-`, or not at all.

    Raises ConfigurationError if it cannot be written after all.
    """
    if file == STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
    elif file:
        try:
            Path(file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigurationError([_problem(name, file, f": {error.strerror}")]) from error


def _problem(name: str, file: str | Path, more: str) -> str:
    return f"--{name.replace('_', '-')}: {str(file)!r} cannot be written{more}"


def _is_writable(path: Path) -> bool:
    """`os.access` comes first: where a folder may not be searched, `is_dir` raises."""
    if os.access(path, os.F_OK):
        return os.access(path, os.W_OK) and not path.is_dir()
    return os.access(path.parent, os.W_OK) and path.parent.is_dir()
