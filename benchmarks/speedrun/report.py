"""Writes what a speedrun found: table.md, curves.svg, scores.svg, results.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.speedrun.curves import (
    AXES,
    PROBES,
    Run,
    finals,
    has_curve,
    measured_probes,
    targets,
    time_to_target,
)
from benchmarks.speedrun.plan import Cost, write_json
from benchmarks.speedrun.plots import draw_curves, draw_scores
from benchmarks.speedrun.rows import Row

TABLE, CURVES, SCORES, RESULTS = FILES = "table.md", "curves.svg", "scores.svg", "results.json"
WITHOUT_MODEL = {  # scores of benchmarks/probes/neighbours.py
    "random_caption": "a random training caption",
    "nearest_caption": "the nearest training image's",
    "consensus": "the consensus of the 15 nearest",
    "person": "a person's against the others of the image",
}
SHOWN_AS_LINES = ("nearest_caption", "consensus")  # a person is far above them
RATIO_AXES = {"seconds": "time", "tflop": "operations", "samples": "samples"}


@dataclass
class Findings:
    """Everything that the report is made of."""

    rows: list[Row]
    runs: dict[str, list[Run]]  # by row, only rows that have one
    costs: dict[str, Cost]  # calibrated, by row; none for a budget in steps
    facts: dict[str, Any]  # budget, seeds, data, command, machine: plain values
    failures: list[str]
    target_rows: list[str]  # the best of them is what the others are compared with


def write_report(output: Path, findings: Findings) -> str:
    """Write ``FILES`` into ``output``; returns the text of table.md."""
    text = as_markdown(findings)
    (output / TABLE).write_text(text, encoding="utf-8")
    (output / CURVES).write_text(draw_curves(findings.rows, findings.runs), encoding="utf-8")
    neighbours = findings.facts.get("neighbours") or {}
    lines = {WITHOUT_MODEL[name]: neighbours[name] for name in SHOWN_AS_LINES if name in neighbours}
    (output / SCORES).write_text(draw_scores(findings.rows, findings.runs, lines), encoding="utf-8")
    write_json(output / RESULTS, _finite(as_results(findings)))
    return text


def as_results(findings: Findings) -> dict[str, Any]:
    """Everything measured, as plain values."""
    probes = measured_probes(_all(findings))
    return {
        **findings.facts,
        "rows": {row.name: {**row.options, "budget_share": row.budget_share} for row in findings.rows},
        "calibration": {name: asdict(cost) for name, cost in findings.costs.items()},
        "runs": [asdict(run) for run in _all(findings)],
        "final": {
            probe: {row: _spread(finals(runs, probe)) for row, runs in findings.runs.items() if finals(runs, probe)}
            for probe in probes
        },
        "time_to_target": {
            probe: {axis: time_to_target(findings.runs, findings.target_rows, probe, axis) for axis in AXES}
            for probe in probes
        },
        "failures": findings.failures,
    }


def as_markdown(findings: Findings) -> str:
    """The tables, with what each is about."""
    probes = measured_probes(_all(findings))
    facts, machine = findings.facts, findings.facts["machine"]
    parts = [
        f"Budget of a row: {facts['budget']}; seeds {', '.join(map(str, facts['seeds']))}; data {facts['data']}; "
        f"recipe {facts['recipe']}. Values are means over seeds (lowest to highest).",
        f"`{facts['command']}`",
        f"{machine['device_name']}, {machine['cpu_count']} CPU cores, {facts['jobs']} trainings at a time, "
        f"{facts['ranks']} rank{'s' if facts['ranks'] > 1 else ''} each; Python {machine['python']}, "
        f"torch {machine['versions']['torch']}; trainings by revision {', '.join(facts['revisions']) or 'none here'}.",
        *map(_source, facts["joined"]),
        "\n".join(_table(_head(probes), [_line(findings, row, probes) for row in findings.rows])),
    ]
    blind = [point.probes["vqa_blind"] for run in _all(findings) for point in run.points if "vqa_blind" in point.probes]
    if blind:
        parts.append(
            f"VQA without the image (the most frequent answer of each type of question): {100 * blind[0]:.1f} %. "
            "Image-text matching by chance: 50 %."
        )
    if neighbours := facts.get("neighbours"):
        shown = ", ".join(f"{WITHOUT_MODEL[name]} {value:.3f}" for name, value in neighbours.items())
        parts.append(f"Captions without a language model, CIDEr-D on the same images: {shown}.")
    skipped = {probe: reason for run in _all(findings) for probe, reason in run.skipped.items()}
    parts += [f"Not measured: {probe} ({reason})." for probe, reason in skipped.items()]
    parts += _against_target(findings, probes)
    parts += [f"Failed: {failure}" for failure in findings.failures]
    return "\n\n".join(parts) + "\n"


def _head(probes: Sequence[str]) -> list[str]:
    return ["row", "steps", "samples", "training, s", "TFLOP", *(PROBES[p] for p in probes), "own held-out loss"]


def _line(findings: Findings, row: Row, probes: Sequence[str]) -> list[str]:
    runs = findings.runs.get(row.name, [])
    if not runs:
        return [row.name, "not finished", *[""] * (len(_head(probes)) - 2)]
    last = runs[0].last
    losses = [run.held_out["loss"] for run in runs if "loss" in run.held_out]
    return [
        row.name,
        str(last.step),
        str(last.samples),
        f"{statistics.fmean(run.last.seconds for run in runs):.0f}",
        f"{statistics.fmean(run.last.tflop for run in runs):.3g}",
        *(_cell(finals(runs, probe), probe) for probe in probes),
        " to ".join(f"{statistics.fmean(values):.2f}" for values in zip(*losses)) if losses else "",
    ]


def _against_target(findings: Findings, probes: Sequence[str]) -> list[str]:
    """What each row is above or below the best target row at its end, and when it gets there."""
    parts = []
    for probe in probes:
        found = targets(findings.runs, findings.target_rows, probe)
        if found is None:
            continue
        reference, target = found
        by_axis = {axis: time_to_target(findings.runs, findings.target_rows, probe, axis) for axis in RATIO_AXES}
        title = PROBES[probe][0].upper() + PROBES[probe][1:]
        parts.append(
            f"**{title}: to where {reference} ends ({_value(target, probe)}).** "
            + _on_ratios(reference, by_axis["seconds"] is not None, has_curve(_all(findings), probe))
        )
        ratios = ["seeds there", *RATIO_AXES.values()] if by_axis["seconds"] else []
        head = ["row", "share of the budget", *ratios, "at its end, against the target"]
        lines = []
        for row in findings.rows:
            runs = findings.runs.get(row.name)
            if not runs:
                continue
            cells = []
            if found := by_axis["seconds"]:
                cells = [f"{found['rows'][row.name]['seeds_there']} of {len(runs)}"]
                cells += [_ratio(by_axis[axis]["rows"][row.name]["ratio"]) for axis in RATIO_AXES]
            gaps = [value - target for value in finals(runs, probe)]
            lines.append([row.name, f"{row.budget_share:g}", *cells, _gap(gaps, probe)])
        parts.append("\n".join(_table(head, lines)))
    return parts


def _on_ratios(reference: str, are_there: bool, are_curves: bool) -> str:
    """What the ratios of a table are, or why it has none."""
    if are_there:
        return (
            f"Time, operations, samples: what the mean curve of {reference} needs over what a row needs, median over "
            "seeds (lowest, highest); above 1 the row is faster."
        )
    return "The untrained models are there already: no ratios." if are_curves else "Of the last checkpoints alone."


def _source(source: Mapping[str, Any]) -> str:
    """What was trained elsewhere."""
    runs = "; ".join(f"{row} {', '.join(map(str, seeds))}" for row, seeds in source["runs"].items())
    machine = source["machine"]
    return (
        f"Trained elsewhere (seeds): {runs}; {machine['device_name']}, {machine['cpu_count']} CPU cores, "
        f"torch {machine['versions']['torch']}, revision {', '.join(source['revisions'])}."
    )


def _ratio(ratio: Mapping[str, float]) -> str:
    words = [
        "not reached" if value == 0 else "at once" if math.isinf(value) else f"{value:.2f}"
        for value in (ratio[name] for name in ("median", "min", "max"))
    ]
    return words[0] if len(set(words)) == 1 else f"{words[0]} ({words[1]}, {words[2]})"


def _cell(values: Sequence[float], probe: str) -> str:
    if not values:
        return ""
    mean = _value(statistics.fmean(values), probe)
    return mean if len(values) == 1 else f"{mean} ({_value(min(values), probe)} to {_value(max(values), probe)})"


def _gap(gaps: Sequence[float], probe: str) -> str:
    scale, digits, unit = (1, 3, "") if "cider_d" in probe else (100, 1, " points")
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (statistics.fmean(gaps), min(gaps), max(gaps)))
    return f"{mean}{unit}" if len(gaps) == 1 else f"{mean} ({low} to {high}){unit}"


def _value(value: float, probe: str) -> str:
    return f"{value:.3f}" if "cider_d" in probe else f"{100 * value:.1f} %"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def _all(findings: Findings) -> list[Run]:
    return [run for runs in findings.runs.values() for run in runs]


def _finite(value: Any) -> Any:
    """Infinite ratios (an untrained model is at the target) as text, which JSON can hold."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
