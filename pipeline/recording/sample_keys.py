"""Which samples each step trained on: RUN/sample_keys-rank<R>.jsonl, one line per step, for proof and for search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from model.batch import Batch
from pipeline.recording.step_lines import StepLines, cut_back

PATTERN = "sample_keys-rank*.jsonl"


class SampleKeys:
    """Writes the keys of this rank's micro-batches, step by step; writes nothing unless ``enabled``."""

    def __init__(self, output: Path, rank: int, enabled: bool) -> None:
        self._lines: StepLines | None = None
        if enabled:
            output.mkdir(parents=True, exist_ok=True)
            self._lines = StepLines(output / PATTERN.replace("*", str(rank)))

    def write(self, step: int, micro_batches: Sequence[Batch]) -> None:
        """``step`` as in log.jsonl: the number of steps done with this one. One list of keys per micro-batch."""
        if self._lines is not None:
            self._lines.write({"step": step, "keys": [batch.keys for batch in micro_batches]})

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def cut_back_sample_keys(output: Path, step: int) -> None:
    """Take the steps after ``step`` out of the files of all ranks, also of ranks that the run no longer has."""
    for path in output.glob(PATTERN):
        cut_back(path, step)


def read_sample_keys(output: Path) -> dict[int, list[str]]:
    """The keys of each step in the global order, whatever topologies took part in the run.

    Raises:
        ValueError: a step stands twice in one rank's file.
    """
    ranks = sorted(output.glob(PATTERN), key=lambda path: int(path.stem.removeprefix("sample_keys-rank")))
    found: dict[int, list[list[list[str]]]] = {}  # step -> rank -> micro-batch -> keys
    for path in ranks:
        steps: set[int] = set()
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["step"] in steps:
                raise ValueError(f"{path}: step {record['step']} stands there twice")
            steps.add(record["step"])
            found.setdefault(record["step"], []).append(record["keys"])
    return {
        step: [key for turn in zip(*of_ranks, strict=True) for keys in turn for key in keys]
        for step, of_ranks in sorted(found.items())
    }
