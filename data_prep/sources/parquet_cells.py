"""Reads the rows of a parquet file: the columns that are wanted, nested ones too, each cell as a Python value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

_ROWS_AT_ONCE = 1000


class Unreadable:
    """A cell whose bytes are no value of its column's type (a date of the year 40000, say)."""

    def __init__(self, problem: str) -> None:
        self._problem = problem

    def __repr__(self) -> str:
        return self._problem


def column_names(path: Path) -> list[str]:
    """The columns of a file; those of a struct (or of a list of structs) also by their paths, like ``image.url``."""
    return [name for field in pyarrow.parquet.read_schema(path) for name in _paths(field.name, field.type)]


def read_cells(path: Path, columns: Sequence[str], binary: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The cells of ``columns`` of each row, by the names that :func:`column_names` gives.

    Texts come through their bytes, since a file may hold strings that are no UTF-8 (they get lone surrogates), and a
    column of type binary is one of texts, unless ``binary`` names it. A column of a list of structs gives a list. A
    cell that can't be read is an :class:`Unreadable`.
    """
    with pyarrow.parquet.ParquetFile(path) as table:
        top = set(table.schema_arrow.names)
        read = list(dict.fromkeys(name if name in top else name.split(".")[0] for name in columns))
        heads = {name.split(".")[0] if name not in top else name for name in binary}
        wanted = [name if name in top else _leaf(table.schema_arrow, name) for name in columns]
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted):
            cells = {name: _values(batch.column(name), name in heads) for name in read}
            for number in range(batch.num_rows):
                row = {name: values[number] for name, values in cells.items()}
                yield {name: pick(row, name) for name in columns}


def pick(row: dict[str, Any], name: str) -> Any:
    """The cell ``name`` of a row: a key of it, or a path through objects; through a list, of each of its entries."""
    if name in row or "." not in name:
        return row.get(name)
    head, _, rest = name.partition(".")
    value = row.get(head)
    if isinstance(value, dict):
        return pick(value, rest)
    if isinstance(value, list):
        return [pick(one, rest) if isinstance(one, dict) else one for one in value]
    return value if isinstance(value, Unreadable) else None


def _paths(name: str, kind: pyarrow.DataType) -> list[str]:
    inner = kind.value_type if _is_list(kind) else kind
    if not pyarrow.types.is_struct(inner):
        return [name]
    return [name, *(path for field in inner for path in _paths(f"{name}.{field.name}", field.type))]


def _leaf(schema: pyarrow.Schema, name: str) -> str:
    """What pyarrow is asked for: the path of a struct's field alone, which spares its others; of a list, all of it."""
    head, *rest = name.split(".")
    kind = schema.field(head).type
    for part in rest:
        if not pyarrow.types.is_struct(kind):
            return head
        kind = kind.field(part).type
    return name


def _is_list(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _values(column: pyarrow.Array, binary: bool) -> list[Any]:
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = column.cast(_without_text(column.type))  # so that one text that is no UTF-8 does not cost the others
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError, pyarrow.ArrowException):
        values = [_value(cell) for cell in column]
    return values if binary else [_decoded(value) for value in values]


def _value(cell: pyarrow.Scalar) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError, pyarrow.ArrowException) as error:
        return Unreadable(str(error)[:80])


def _without_text(kind: pyarrow.DataType) -> pyarrow.DataType:
    """``kind`` with binary in the place of text, also inside lists and structs; any column can be cast to it."""
    types = pyarrow.types
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pyarrow.large_binary()
    if types.is_large_list(kind):
        return pyarrow.large_list(_without_text(kind.value_type))
    if types.is_list(kind):
        return pyarrow.list_(_without_text(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([(field.name, _without_text(field.type)) for field in kind])
    return kind


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    if isinstance(value, dict):
        return {name: _decoded(one) for name, one in value.items()}
    return value
