"""The journal of an evaluation: what every finished batch gave, a line each, so that a killed evaluation goes on.

``parts/rank-R.jsonl`` in the evaluation's folder is written by rank R of whatever number of ranks there is at the
time. Lines are JSON; arrays stand in them as base64 with dtype and shape, and nothing is unpickled. A line that a kill
cut off is no JSON and counts for nothing: its batch is computed again.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.tasks.evaluation import BatchRecord, as_numbers

PARTS = "parts"
_ARRAY = {"base64", "dtype", "shape"}
_KINDS = "biuf"  # of numpy: truth values, whole numbers, real numbers


class Journal:
    """Of one rank, in the folder of the evaluation, which is there."""

    def __init__(self, folder: Path, rank: int) -> None:
        parts = folder / PARTS
        parts.mkdir(exist_ok=True)
        self._stream = open(parts / f"rank-{rank}.jsonl", "ab")  # noqa: SIM115
        if self._stream.tell():
            self._stream.write(b"\n")  # after a line that was cut off, perhaps

    def add(self, number: int, record: BatchRecord) -> BatchRecord:
        """Write down a batch of pass ``number``; returns it as it will be read: with numbers, lists and arrays only."""
        line = encoded(number, record)
        self._stream.write(line + b"\n")
        self._stream.flush()
        return _decoded(line)[1]

    def close(self) -> None:
        self._stream.close()


def read_journal(folder: Path) -> tuple[dict[int, list[BatchRecord]], int]:
    """The batches written down by pass, each once, and the number of lines that are not whole."""
    found: dict[int, list[BatchRecord]] = defaultdict(list)
    seen: dict[int, set[int]] = defaultdict(set)
    torn = 0
    for path in sorted((folder / PARTS).glob("rank-*.jsonl")):
        with open(path, "rb") as stream:
            for line in stream:
                if not line.strip():
                    continue
                try:
                    number, record = _decoded(line)
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    torn += 1
                    continue
                if seen[number].isdisjoint(record.positions):
                    seen[number].update(record.positions)
                    found[number].append(record)
    return found, torn


def remove_journal(folder: Path) -> None:
    """What is done needs none; the batches go first, then what says that the evaluation was begun."""
    for path in (folder / PARTS).glob("rank-*.jsonl"):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def encoded(number: int, record: BatchRecord) -> bytes:
    """A line, without its end. Floats are written so that they are read back the same."""
    [sums] = as_numbers([record])
    content = {"pass": number, **record._asdict(), "sums": sums}
    return json.dumps(content, default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS:
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"base64": data, "dtype": value.dtype.str, "shape": list(value.shape)}
    raise TypeError(f"a prediction holds a {type(value).__name__}: expected what JSON holds, or arrays of numbers")


def _decoded(line: bytes) -> tuple[int, BatchRecord]:
    """Raises ValueError, TypeError, KeyError, AttributeError or RecursionError for what no ``encoded`` wrote."""
    content = json.loads(line, object_hook=_as_array)
    number = int(content.pop("pass"))
    record = BatchRecord(**content)
    return number, record._replace(problems=[(key, reason) for key, reason in record.problems])


def _as_array(content: dict[str, Any]) -> Any:
    if set(content) != _ARRAY:
        return content
    dtype = np.dtype(content["dtype"])
    if dtype.kind not in _KINDS:
        raise ValueError(f"an array of {dtype}")
    return np.frombuffer(base64.b64decode(content["base64"]), dtype).reshape(content["shape"]).copy()
