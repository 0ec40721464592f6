"""Cells of parquet files of any nesting are the values that were written."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.sources.parquet_cells import read_cells

VALUES = [
    ("a dög", pyarrow.string()),
    ("a dög", pyarrow.large_string()),
    ("a dög", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
    (7, pyarrow.int64()),
    ([("key", "value")], pyarrow.map_(pyarrow.string(), pyarrow.string())),
]
AROUND: dict[str, tuple[Callable[[pyarrow.DataType], pyarrow.DataType], Callable[[Any], Any]]] = {
    "list": (pyarrow.list_, lambda value: [value, None]),
    "large_list": (pyarrow.large_list, lambda value: [value]),
    "struct": (
        lambda kind: pyarrow.struct([("a", kind), ("b", pyarrow.int8())]),
        lambda value: {"a": value, "b": None},
    ),
    "required": (
        lambda kind: pyarrow.struct([pyarrow.field("a", kind, nullable=False)]),
        lambda value: {"a": value},
    ),
}


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(AROUND, repeat=2)))
def test_any_nesting_is_read_as_it_was_written(tmp_path: Path, outer: str, inner: str) -> None:
    (outer_kind, outer_value), (inner_kind, inner_value) = AROUND[outer], AROUND[inner]
    for value, kind in VALUES:
        cells = [outer_value(inner_value(value)), None]
        table = pyarrow.table({"c": pyarrow.array(cells, outer_kind(inner_kind(kind)))})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert [row["c"] for row in read_cells(tmp_path / "a.parquet", ["c"])] == cells
