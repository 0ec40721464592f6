"""Reads annotation files: JSON, JSON lines, and the typed fields of their entries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.record import MissingInput, PrepError, Rejection


class BadEntry(ValueError):
    """An entry of an annotation file can't be used, for ``reason``; the rest of the file can."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises PrepError."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise PrepError(f"{path}: not readable as JSON ({error}); download it again") from error


def read_object(path: Path, expected: str) -> dict[str, Any]:
    """The object that a JSON file holds; ``expected`` says which kind of file it should be. Raises PrepError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise PrepError(f"{path}: holds {_kind(content)}, expected {expected}")
    return content


def entries_of(content: dict[str, Any], field: str, path: Path, expected: str) -> list[Any]:
    """The list ``field`` of a file's object; raises PrepError."""
    entries = content.get(field)
    if not isinstance(entries, list):
        found = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise PrepError(f"{path}: no list `{field}` (found: {found}), expected {expected}")
    return entries


def read_json_lines(path: Path, expected: str) -> Iterator[tuple[str, dict[str, Any]] | Rejection]:
    """(name of the line, its object) of each line that is not blank, in the file's order; other lines as Rejection.

    A last line without line feed counts like any other. Raises PrepError where no line holds an object.
    """
    objects = 0
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                name = f"{path.name} line {number}"
                try:
                    row = json.loads(line)
                except UnicodeDecodeError as error:
                    yield Rejection("invalid_utf8", name, str(error)[:200])
                    continue
                except (ValueError, RecursionError) as error:
                    yield Rejection("malformed_row", name, str(error)[:200])
                    continue
                if isinstance(row, dict):
                    objects += 1
                    yield name, row
                else:
                    yield Rejection("malformed_row", name, f"holds {_kind(row)}, expected an object")
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such file") from None
    if not objects:
        raise PrepError(f"{path}: no line holds a JSON object, expected {expected}")


def whole_number(entry: Any, field: str) -> int:
    """The int ``field`` of an entry; raises BadEntry."""
    value = _value(entry, field)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadEntry("malformed_row", f"`{field}` is {_shown(value)}, expected a whole number")
    return value


def text(entry: Any, field: str) -> str:
    """The string ``field`` of an entry, which may be empty; raises BadEntry."""
    value = _value(entry, field)
    if not isinstance(value, str):
        raise BadEntry("malformed_row", f"`{field}` is {_shown(value)}, expected a text")
    if not is_utf8(value):
        raise BadEntry("invalid_utf8", f"`{field}` is {_shown(value)}")
    return value


def is_utf8(value: str) -> bool:
    """Whether UTF-8 can hold a string: JSON can name half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def list_of(entry: Any, field: str) -> list[Any]:
    """The list ``field`` of an entry; raises BadEntry."""
    value = _value(entry, field)
    if not isinstance(value, list):
        raise BadEntry("malformed_row", f"`{field}` is {_shown(value)}, expected a list")
    return value


def file_name(entry: Any, field: str) -> str:
    """The string ``field`` of an entry as a file name without folder; raises BadEntry."""
    value = text(entry, field)
    if not value or value in (".", "..") or "/" in value or "\\" in value or "\0" in value:
        raise BadEntry("malformed_row", f"`{field}` is {_shown(value)}, expected the name of a file without its folder")
    return value


def _value(entry: Any, field: str) -> Any:
    if not isinstance(entry, dict):
        raise BadEntry("malformed_row", f"holds {_kind(entry)}, expected an object")
    if field not in entry:
        found = ", ".join(map(str, list(entry)[:8])) or "nothing"
        raise BadEntry("malformed_row", f"has no `{field}` (found: {found})")
    return entry[field]


def _shown(value: Any) -> str:
    return ascii(value)[:80]


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")
