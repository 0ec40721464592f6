"""Incidents on disk, the choice of where to go back to, and what is remembered of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.checkpoint.files import step_of
from pipeline.incidents.records import (
    IncidentError,
    list_incidents,
    name_checkpoint,
    read_incident,
    write_incident,
)
from pipeline.incidents.rewind import (
    RewindError,
    SkippedBatches,
    decide_rewind,
    finish_setting_aside,
    ways_back,
)

CONTENT = {
    "step": 7,
    "reason": "the loss is not finite (nan)",
    "micro_batches": [{"keys": ["nan", "b"], "losses": {"flm": math.nan}}],
    "counts": {"flm": 3},
    "terms": {"flm": math.inf},
    "topology": {},
    "config": {},
    "checkpoint": "step_00000008",
}


def test_an_incident_survives_the_way_to_disk(tmp_path: Path) -> None:
    """Numbers that JSON does not know come back as numbers, sample keys of the same name stay keys."""
    folder = write_incident(tmp_path, 7, CONTENT)
    assert list_incidents(tmp_path) == [folder] and folder.name == "step_00000007"
    assert not list(tmp_path.glob("incidents/*.tmp"))
    json.loads((folder / "incident.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    found = read_incident(folder)
    [row] = found["micro_batches"]
    assert row["keys"] == ["nan", "b"] and math.isnan(row["losses"]["flm"]) and found["terms"]["flm"] == math.inf
    write_incident(tmp_path, 7, CONTENT | {"checkpoint": None})
    assert read_incident(folder / "incident.json")["checkpoint"] is None


def test_a_checkpoint_that_moved_is_named_anew(tmp_path: Path) -> None:
    write_incident(tmp_path, 7, CONTENT)
    other = write_incident(tmp_path, 9, CONTENT | {"step": 9, "checkpoint": "step_00000010"})
    (write_incident(tmp_path, 11, CONTENT) / "incident.json").write_text("{")
    name_checkpoint(tmp_path, "step_00000008", "before_rewind_1/step_00000008")
    assert read_incident(tmp_path / "incidents" / "step_00000007")["checkpoint"] == "before_rewind_1/step_00000008"
    assert read_incident(other)["checkpoint"] == "step_00000010"
    with pytest.raises(IncidentError, match="damaged"):
        read_incident(tmp_path / "incidents" / "step_00000011")


def make_checkpoints(run: Path, *steps: int) -> None:
    for step in steps:
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("first_bad", "before", "damaged", "expected"),
    [
        (300, 50, (), 200),
        (300, 0, (), 300),  # a checkpoint of step 300 was written before step 300
        (299, 0, (), 200),
        (120, 50, (), 100),  # none is 50 older: the newest before it
        (300, 50, (200,), 100),
        (99, 0, (), None),
    ],
)
def test_where_to_go_back_to(tmp_path: Path, first_bad, before, damaged, expected) -> None:
    make_checkpoints(tmp_path, 100, 200, 300, 400)
    steps = [step_of(path) for path in ways_back(tmp_path, first_bad, before)]
    assert next((step for step in steps if step not in damaged), None) == expected
    assert sorted(steps) == [step for step in (100, 200, 300, 400) if step <= first_bad]


def test_a_rewind_is_remembered_before_anything_moves(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 100, 200, 300)
    write_incident(tmp_path, 250, CONTENT | {"checkpoint": "step_00000300"})
    decide_rewind(tmp_path, tmp_path / "checkpoints" / "step_00000100", [250, 252], before=160, now=260)
    assert SkippedBatches.read(tmp_path).setting_aside == 100
    assert SkippedBatches.read(tmp_path).steps == list(range(100, 253))  # never steps from before the checkpoint
    for _ in range(2):  # the second time, as after a kill, there is nothing left to do
        finish_setting_aside(tmp_path)
        names = sorted(path.relative_to(tmp_path / "checkpoints").as_posix() for path in tmp_path.rglob("step_*00"))
        assert names == ["before_rewind_1/step_00000200", "before_rewind_1/step_00000300", "step_00000100"]
    assert SkippedBatches.read(tmp_path).setting_aside is None
    assert read_incident(tmp_path / "incidents" / "step_00000250")["checkpoint"] == "before_rewind_1/step_00000300"
    decide_rewind(tmp_path, tmp_path / "checkpoints" / "step_00000100", [400], before=0, now=401)
    assert len(SkippedBatches.read(tmp_path).rewinds) == 2 and SkippedBatches.read(tmp_path).steps[-1] == 400


@pytest.mark.parametrize("content", ["{", '{"step": [1]}', '{"steps": ["1"]}', '{"steps": 5}', "[1]"])
def test_a_file_written_by_hand_is_read_or_refused(tmp_path: Path, content: str) -> None:
    assert SkippedBatches.read(tmp_path) == SkippedBatches()
    (tmp_path / "passed_by.json").write_text('{"steps": [3, 4]}')
    assert SkippedBatches.read(tmp_path).steps == [3, 4]
    (tmp_path / "passed_by.json").write_text(content)
    with pytest.raises(RewindError, match=r"passed_by\.json.*fix it"):
        SkippedBatches.read(tmp_path)
