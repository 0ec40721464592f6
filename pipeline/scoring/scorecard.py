"""The files that an evaluation leaves: scorecard, predictions, what is to be submitted, the ledger of test splits."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.manifest import write_atomically
from pipeline.config.options import ConfigError
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.transforms import UnusableSample
from pipeline.tasks.task import Prediction

SCORECARD, PREDICTIONS, SUBMISSION, LEDGER = "scorecard.json", "predictions.jsonl", "submission", "ledger.jsonl"
FORMAT_VERSION = 1
STANDARD_ERROR = "_standard_error"  # behind the name of the value that it belongs to
SHOWN_PROBLEMS = 20
TEST = "test"  # what the names of splits begin with that are to be looked at once


def split_values(values: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics, and standard errors by the name of their metric."""
    metrics = {name: value for name, value in values.items() if not name.endswith(STANDARD_ERROR)}
    errors = {name.removesuffix(STANDARD_ERROR): value for name, value in values.items() if name not in metrics}
    return metrics, errors


def write_scorecard(folder: Path, content: Mapping[str, Any]) -> None:
    """scorecard.json, whole or not at all; what is not finite is null."""
    text = json.dumps({"format_version": FORMAT_VERSION, **_finite(content)}, indent=1, allow_nan=False)
    write_atomically(folder / SCORECARD, text + "\n")


def write_predictions(folder: Path, predictions: Sequence[Prediction]) -> None:
    """predictions.jsonl, a line per item in order, without what begins with "_"; arrays are lists."""
    shown = ({name: value for name, value in one.items() if not name.startswith("_")} for one in predictions)
    write_atomically(folder / PREDICTIONS, "".join(json.dumps(one, default=_plain) + "\n" for one in shown))


def write_submission(folder: Path, content: Any) -> Path:
    """submission.csv for a text, else submission.json."""
    is_text = isinstance(content, str)
    path = folder / f"{SUBMISSION}.{'csv' if is_text else 'json'}"
    write_atomically(path, content if is_text else json.dumps(content) + "\n")
    return path


def remove_submission(folder: Path) -> None:
    """Remove the file of an earlier evaluation, which is not of these predictions."""
    for kind in ("json", "csv"):
        (folder / f"{SUBMISSION}.{kind}").unlink(missing_ok=True)


def samples_of(corpora: Sequence[Corpus], rows: Iterable[tuple[int, int]]) -> Iterator[RawSample]:
    """The samples of an evaluation without their images; raises ConfigError for one that can't be read."""
    for corpus, row in rows:
        try:
            yield corpora[corpus].read_without_images(row)
        except UnusableSample as error:
            raise ConfigError(f"{error.key}: {error.reason}; a submission needs every item") from None


def count_test(root: Path, split: str, corpora: Mapping[str, Any], name: str) -> int | None:
    """Enter an evaluation of a split named test.. into the ledger; how many of the same data it names before.

    None for another split, which may be looked at as often as one likes. ``corpora`` are those of the split with their
    fingerprints, ``name`` the evaluation's folder.
    """
    if not split.startswith(TEST):
        return None
    before = 0
    for line in (root / LEDGER).read_bytes().splitlines() if (root / LEDGER).is_file() else []:
        try:
            entry = json.loads(line)
            before += bool(set(entry["fingerprints"]) & {one["fingerprint"] for one in corpora.values()})
        except (ValueError, KeyError, TypeError):  # cut off by a kill
            continue
    fingerprints = sorted(one["fingerprint"] for one in corpora.values())
    entry = {"time": now(), "split": split, "evaluation": name, "fingerprints": fingerprints}
    with open(root / LEDGER, "ab") as stream:
        stream.write(b"\n" + json.dumps(entry).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    return before


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a prediction holds a {type(value).__name__}: expected what JSON holds, or arrays of numbers")
