"""The journal gives back exactly what was written, whatever a kill left of it, and executes nothing."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scoring.journal import Journal, read_journal, remove_journal
from pipeline.tasks.evaluation import BatchRecord

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3) / 7


def record(start: int, **prediction: object) -> BatchRecord:
    positions = [start, start + 1]
    predictions = [{"position": position, "key": f"é\u2028{position}", **prediction} for position in positions]
    return BatchRecord(positions, {"loss": torch.tensor(0.1), "items": 2}, predictions, [("bad", "no image")])


def write(folder: Path, rank: int, *records: BatchRecord, number: int = 0) -> None:
    journal = Journal(folder, rank)
    for one in records:
        journal.add(number, one)
    journal.close()


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    kept = journal.add(1, record(4, _scores=ARRAY, right=np.bool_(True), score=np.float64(0.1)))
    journal.close()
    ((number, (found,)),) = read_journal(tmp_path)[0].items()
    assert number == 1 and found.positions == kept.positions == [4, 5] and found.problems == [("bad", "no image")]
    assert found.sums == kept.sums == {"loss": float(torch.tensor(0.1)), "items": 2.0}
    for one in (*kept.predictions, *found.predictions):
        assert one["right"] is True and one["score"] == 0.1 and "\u2028" in one["key"]
        assert one["_scores"].dtype == ARRAY.dtype and np.array_equal(one["_scores"], ARRAY)


@given(st.lists(st.floats(allow_nan=False), min_size=1), st.sampled_from(["<f4", "<f8", "<i2", "|b1", "<f2"]))
def test_sums_and_arrays_of_any_value_come_back_the_same(tmp_path_factory, values: list[float], dtype: str) -> None:
    folder = tmp_path_factory.mktemp("journal")
    with np.errstate(all="ignore"):
        array = np.array(values).astype(dtype)
    write(folder, 0, BatchRecord([0], dict(enumerate(values)), [{"position": 0, "array": array}], []))
    (found,) = read_journal(folder)[0][0]
    assert list(found.sums.values()) == values and found.predictions[0]["array"].tobytes() == array.tobytes()


def test_a_line_cut_off_anywhere_counts_for_nothing_and_the_next_process_writes_on(tmp_path: Path) -> None:
    write(tmp_path, 0, record(0, _scores=ARRAY), record(2))
    path = tmp_path / "parts" / "rank-0.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole) + 1):
        path.write_bytes(whole[:length])
        write(tmp_path, 0, record(4))
        found, torn = read_journal(tmp_path)
        is_whole = length >= len(whole) - 1
        assert [one.positions for one in found[0]] == [[0, 1], *([[2, 3]] if is_whole else []), [4, 5]], length
        assert torn == (not is_whole and length > first)


def test_ranks_of_earlier_processes_count_once(tmp_path: Path) -> None:
    write(tmp_path, 0, record(0))
    write(tmp_path, 3, record(2), record(0))
    write(tmp_path, 1, record(0), number=1)
    found, _ = read_journal(tmp_path)
    assert {number: sorted(one.positions for one in records) for number, records in found.items()} == {
        0: [[0, 1], [2, 3]],
        1: [[0, 1]],
    }
    remove_journal(tmp_path)
    assert read_journal(tmp_path) == ({}, 0) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        b"null",
        b"[]",
        b'{"pass": 0}',
        b"\0" * 64,
        b"[" * 100_000,
        json.dumps({"pass": 0, "positions": [0], "sums": {}, "problems": [], "predictions": [], "more": 1}).encode(),
    ],
)
def test_what_is_no_record_is_passed_over(tmp_path: Path, line: bytes) -> None:
    write(tmp_path, 0, record(0))
    with open(tmp_path / "parts" / "rank-0.jsonl", "ab") as stream:
        stream.write(line + b"\n")
    found, torn = read_journal(tmp_path)
    assert len(found[0]) == 1 and torn == 1


def test_no_array_of_objects_is_read_or_written(tmp_path: Path) -> None:
    """numpy would unpickle them."""
    with pytest.raises(TypeError, match="expected what JSON holds, or arrays of numbers"):
        write(tmp_path, 0, record(0, answer=np.array([{}], dtype=object)))
    array = {"base64": base64.b64encode(b"\0" * 8).decode(), "dtype": "|O", "shape": [1]}
    content = record(0)._replace(sums={}, predictions=[{"position": 0, "array": array}])._asdict()
    path = tmp_path / "parts" / "rank-0.jsonl"
    path.write_text(json.dumps({"pass": 0, **content}) + "\n")
    assert read_journal(tmp_path) == ({}, 1)


def test_what_is_not_finite_comes_back(tmp_path: Path) -> None:
    write(tmp_path, 0, BatchRecord([0], {"loss": math.nan, "other": math.inf}, [], []))
    (found,) = read_journal(tmp_path)[0][0]
    assert math.isnan(found.sums["loss"]) and found.sums["other"] == math.inf
