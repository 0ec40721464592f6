"""Whether two runs are the same run, bit for bit: samples, logged numbers, weights, moments, state."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pipeline.checkpoint.files import newest_valid, weights_hash
from pipeline.checkpoint.reading import Reader
from pipeline.recording.sample_keys import read_sample_keys

MEASURED = re.compile(r"(^|_)(time|seconds|second|gib|mfu|bytes|rank)$|data_wait_share")  # time and memory, not the run

ABOUT_SAVING = ("checkpoint", "alarm")  # written when a save ends, which is a matter of time


def differences(whole: Path, other: Path) -> list[str]:
    """What differs between two finished runs, in words; empty when they are the same run."""
    found = []
    keys, other_keys = read_sample_keys(whole), read_sample_keys(other)
    if keys != other_keys:
        steps = [step for step in sorted({*keys, *other_keys}) if keys.get(step) != other_keys.get(step)]
        found.append(f"{other.name}: samples of step {steps[0]} and {len(steps) - 1} more")
    found += _log_differences(whole, other)
    (path, _), (other_path, _) = newest_valid(whole), newest_valid(other)
    if _hash_of_trained(path) != _hash_of_trained(other_path):
        found.append(f"{other.name}: weights")
    for what, read in (("step", lambda p: p.name), ("tensors", tensor_hashes), ("state", state_of)):
        if read(path) != read(other_path):
            found.append(f"{other.name}: {what} of the last checkpoint")
    return found


def _hash_of_trained(path: Path) -> str:
    """Of the weights in a checkpoint; those that were not trained are in its state, by their hash."""
    return weights_hash(dict(Reader(path, kinds=("weight",)).read_all("weight")))


def _log_differences(whole: Path, other: Path) -> list[str]:
    """log.jsonl line by line, and each line that a resumed run did again against the one that counts."""
    expected, records = read_lines(whole / "log.jsonl"), read_lines(other / "log.jsonl")
    found = []
    if records != expected:
        pairs = zip(expected, records, strict=False)
        first = next((a for a, b in pairs if a != b), f"{len(records)} lines instead of {len(expected)}")
        found.append(f"{other.name}: log.jsonl at {first}")
    overtaken = other / "log.superseded.jsonl"
    for record in read_lines(overtaken) if overtaken.is_file() else []:
        if record not in expected:
            found.append(f"{other.name}: step {record['step']} ({record['kind']}) done again gave other numbers")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of the file but those about saving, measures of time and memory left out; a torn line raises."""
    records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [
        {name: value for name, value in record.items() if not MEASURED.search(name)}
        for record in records
        if record.get("kind") not in ABOUT_SAVING
    ]


def state_of(path: Path) -> dict[str, Any]:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return {name: value for name, value in state.items() if not MEASURED.search(name)}


def tensor_hashes(path: Path) -> dict[tuple[str, str], str]:
    """(file, tensor name) -> SHA-256 of its bytes, of all tensors of a checkpoint: weights and both moments."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="np") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                found[file.name, name] = hashlib.sha256(handle.get_tensor(name).tobytes()).hexdigest()
    return found
