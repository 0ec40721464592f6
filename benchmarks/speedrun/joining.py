"""Results of the same comparison from other folders or machines: their trainings count as done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.speedrun.curves import Point, Run
from benchmarks.speedrun.plan import Cost, changes, few, unpacked
from pipeline.config.options import ConfigError

IDENTITY, SOURCES = "identity", "joined"  # names in results.json
_NEEDED = {IDENTITY, "runs", "calibration", "clock", "machine", "revisions"}


@dataclass
class Joined:
    """What was read: ``runs`` by row and seed, what a step of a row ``costs``, the scores of ``neighbours``, and for
    each of ``sources`` its machine, the revisions of its code, and the seeds of each row that are from there.
    """

    runs: dict[tuple[str, int], Run] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    neighbours: dict[str, float] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)


def join(paths: Sequence[Path], identity: Mapping[str, Any], seeds: Sequence[int], clock: str) -> Joined:
    """Read files results.json; nothing is taken of rows that ``identity`` has not, and of other seeds.

    Raises:
        ConfigError: no such file, none of a speedrun, of another comparison or ``clock`` (names what differs), or two
            files with other figures for the same training.
    """
    joined = Joined()
    for path in paths:
        results = _results(path)
        found = changes(unpacked(results[IDENTITY]), identity)
        if found := found + changes({"--clock": results["clock"]}, {"--clock": clock}):
            raise ConfigError(f"--join: {path} is of another comparison ({few(found)})")
        new = {}
        for run in _runs(path, results["runs"]):
            place = (run.row, run.seed)
            if joined.runs.get(place, run) != run:
                raise ConfigError(f"--join: row {run.row}, seed {run.seed} has other figures in {path} than before it")
            if f"row {run.row}" in identity and run.seed in seeds and place not in joined.runs:
                new[place] = run
        joined.runs |= new
        joined.costs = {name: Cost(**cost) for name, cost in results["calibration"].items()} | joined.costs
        joined.neighbours = joined.neighbours or results.get("neighbours") or {}
        joined.sources += _sources(results, new)
    return joined


def _sources(results: Mapping[str, Any], new: Mapping[tuple[str, int], Run]) -> list[dict[str, Any]]:
    """Where the ``new`` ones of a file's runs are from: files that were joined in it, else its own machine."""
    own = {"machine": results["machine"], "revisions": results["revisions"]}
    found, left = [], set(new)
    for source in [*results.get(SOURCES, []), None]:
        these = left if source is None else {(row, s) for row, s in left if s in source["runs"].get(row, ())}
        left = left - these
        seeds = {row: sorted(seed for name, seed in these if name == row) for row in sorted({row for row, _ in these})}
        found += [{**(source or own), "runs": seeds}] if seeds else []
    return found


def _results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--join: {path}: not readable ({error}), expected results.json of a speedrun") from None
    missing = _NEEDED - (results.keys() if isinstance(results, dict) else set())
    if missing:
        raise ConfigError(
            f"--join: {path}: found no {', '.join(sorted(missing))}, expected results.json of a speedrun; those of "
            "earlier versions do not say what was compared"
        )
    return results


def _runs(path: Path, contents: Sequence[Mapping[str, Any]]) -> list[Run]:
    runs = []
    for content in contents:
        try:
            points = [Point(**point) for point in content["points"]]
            held_out = {name: tuple(values) for name, values in content["held_out"].items()}
            runs.append(Run(**{**content, "points": points, "held_out": held_out}))
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"--join: {path}: a training in it is not readable ({error!r})") from None
    return runs
