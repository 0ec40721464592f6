"""Files with a line per step: written at once, cut back on resume, read back in the global order."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.data.order import micro_batch_positions
from pipeline.recording.sample_keys import SampleKeys, cut_back_sample_keys, read_sample_keys
from pipeline.recording.step_lines import StepLines, cut_back


def train(output: Path, steps: range, world: int, micro: int, batch: int = 8) -> None:
    """What the ranks of one part of a run write; the key of position p is str(p)."""
    accumulation = batch // micro // world
    for rank in range(world):
        lines = SampleKeys(output, rank, enabled=True)
        for step in steps:
            places = [
                micro_batch_positions(step, turn, rank, world, micro, accumulation) for turn in range(accumulation)
            ]
            lines.write(step + 1, [SimpleNamespace(keys=[str(p) for p in place]) for place in places])
        lines.close()


def test_parts_on_several_topologies_read_as_one_run(tmp_path: Path) -> None:
    train(tmp_path, range(6), world=2, micro=2)
    cut_back_sample_keys(tmp_path, 4)
    train(tmp_path, range(4, 9), world=4, micro=1)
    cut_back_sample_keys(tmp_path, 5)
    train(tmp_path, range(5, 10), world=1, micro=4)
    expected = {step + 1: [str(p) for p in range(step * 8, step * 8 + 8)] for step in range(10)}
    assert read_sample_keys(tmp_path) == expected


def test_a_step_that_stands_twice_is_refused(tmp_path: Path) -> None:
    train(tmp_path, range(3), world=1, micro=2)
    train(tmp_path, range(2, 4), world=1, micro=2)
    with pytest.raises(ValueError, match="step 3 stands there twice"):
        read_sample_keys(tmp_path)


def test_nothing_is_written_unless_asked_for(tmp_path: Path) -> None:
    SampleKeys(tmp_path / "run", 0, enabled=False).write(1, [])
    assert not (tmp_path / "run").exists()


def test_a_line_is_on_disk_before_the_process_goes_on(tmp_path: Path) -> None:
    lines = StepLines(tmp_path / "x.jsonl")
    lines.write({"step": 1})
    assert (tmp_path / "x.jsonl").read_text() == '{"step": 1}\n'
    lines.close()
    lines.write({"step": 2})
    assert (tmp_path / "x.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', '{"step": 3}', "\0\0\0\n", '{"loss": 1}\n', "7\n"])
def test_cut_back_drops_later_steps_and_torn_lines(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    path.write_text("".join(lines) + torn)
    assert cut_back(path, 2) == lines[2:]
    assert path.read_text() == "".join(lines[:2])
    assert cut_back(path, 2) == []
    assert [item.name for item in tmp_path.iterdir()] == ["x.jsonl"]


def test_cut_back_of_nothing(tmp_path: Path) -> None:
    assert cut_back(tmp_path / "absent.jsonl", 3) == []
