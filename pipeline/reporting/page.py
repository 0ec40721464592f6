"""The report of a run, one self-contained page with its curves, costs and captions."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from data_prep.manifest import write_atomically
from pipeline.config.options import leaves
from pipeline.incidents.records import incident_folder
from pipeline.recording.run_log import EVENTS, LOG_NAME
from pipeline.reporting.formats import duration, is_finite, number, percent, signed, spoken
from pipeline.reporting.reading import NOT_SCORES, SHUFFLED, ReportError, Run, evaluations_of, load_run, names_of
from pipeline.reporting.run_figures import figures

REPORT_NAME = "report.html"
EVENTS_SHOWN = 100  # the latest; log.jsonl has all
_EVENTS = {**EVENTS, "resume": "resumed"}
_BOOKKEEPING = {"kind", "step", "time"}


@dataclass
class Row:
    """One held-out number: at the first and last evaluation, and at the last with shuffled images."""

    name: str
    first: float | None
    last: float | None
    shuffled: float | None


def report_or_warn(run_dir: Path, told: TextIO) -> None:
    """Write the report and name it on the stream ``told``; what is trained and scored is not lost with it."""
    try:
        print(f"report: {write_report(run_dir)}", file=told, flush=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"warning: no report ({reason}); `python -m pipeline.report --run {run_dir}` writes it", file=sys.stderr)


def write_report(run_dir: Path) -> Path:
    """Writes RUN/report.html from what the run has written so far; raises ReportError where there is no run."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ReportError(f"{run_dir} is not a folder; give the --output of a training run")
    run, evaluations = load_run(run_dir), evaluations_of(run_dir)
    if run.is_empty and not evaluations:
        raise ReportError(f"{run_dir} holds neither config.yaml nor {LOG_NAME}; give the --output of a training run")
    rows = held_out_rows(run.held_out)
    happened = sorted([*run.events, *run.course.entries], key=lambda one: one.get("time") or 0)
    page = template("report.html.j2").render(
        run=run,
        evaluations=evaluations,
        facts=facts(run),
        tiles=tiles(run),
        rows=rows,
        shuffled=any(row.shuffled is not None for row in rows),
        evaluated=[run.held_out[0]["step"], run.held_out[-1]["step"]] if run.held_out else [],
        figures=[figure for figure in figures(run) if figure is not None],
        events=[event(record) for record in happened[-EVENTS_SHOWN:]],
        num_events=len(happened),
        environment=[(name, _listed(value)) for name, value in leaves(run.environment) if name[:7] != "better."],
        config=yaml.safe_dump(run.config, sort_keys=False) if run.config else "",
        deepspeed=json.dumps(run.deepspeed, indent=2) if run.deepspeed else "",
    )
    path = run_dir / REPORT_NAME
    write_atomically(path, page)
    return path


def _listed(value: Any) -> Any:
    """The value, of a long list how many it holds: environment.json has all."""
    return f"{len(value)} names" if isinstance(value, list) and len(value) > 8 else value


def template(name: str) -> Template:
    """A page of templates/, everything escaped that it is given."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, signed=signed, percent=percent, spoken=spoken)
    return environment.get_template(name)


def facts(run: Run) -> list[tuple[str, str]]:
    """The line under the title: what ran on what."""
    wanted = {
        "recipe": ("recipe",),
        "objective": ("objective",),
        "device": ("device_name", "device", "gpu", "cpu"),
        "ranks": ("world_size", "ranks"),
        "ZeRO stage": ("zero_stage",),
        "precision": ("precision",),
        "parameters": ("parameters", "num_parameters"),
    }
    known = {name.rsplit(".", 1)[-1]: value for name, value in leaves(run.environment)}
    known.setdefault("zero_stage", run.deepspeed.get("zero_optimization", {}).get("stage"))
    objective = run.config.get("objective")
    known.setdefault("objective", objective.get("name") if isinstance(objective, dict) else objective)
    found = []
    for label, names in wanted.items():
        value = next((known[name] for name in names if known.get(name) not in (None, "")), None)
        if value is not None:
            found.append((label, number(value)))
    return [*found, ("state", run.course.ending)] if run.course.ending else found


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(value, label, note) of the few numbers a reader looks for first."""
    found = []
    steps = max((record["step"] for record in run.train + run.held_out), default=0)
    planned = run.config.get("train", {}).get("steps") if isinstance(run.config.get("train"), dict) else None
    if steps:
        found.append((number(steps), "steps", f"of {number(planned)}" if planned else ""))
    course = run.course
    if course.training_seconds is not None:
        wall = f"of {duration(course.wall_seconds)} on the wall" if course.wall_seconds else ""
        found.append((duration(course.training_seconds), "training time", wall))
    rates = [record["samples_per_second"] for record in run.train if is_finite(record.get("samples_per_second"))]
    if rates:
        found.append((number(sorted(rates)[len(rates) // 2]), "samples per second", "median over the run"))
    losses = [row for row in held_out_rows(run.held_out) if "loss" in row.name and row.first and row.last]
    if losses:
        row = min(losses, key=lambda row: (row.name not in ("loss", "flm_loss"), row.name))
        found.append((number(row.last), f"held-out {spoken(row.name)}", f"from {number(row.first)}"))
    for name, value in run.samples.get("summary", {}).items():
        if isinstance(value, float) and not name.endswith("_standard_error"):
            shown = number(value) if name == "cider_d" else percent(value)
            found.append((shown, spoken(name), "held-out captions"))
    return found


def held_out_rows(records: list[dict[str, Any]]) -> list[Row]:
    """One row per held-out number, in the order in which they were logged."""
    rows = []
    for name in names_of(records):
        if name.startswith(SHUFFLED) or name in NOT_SCORES:
            continue
        values = [record[name] for record in records if isinstance(record.get(name), (int, float))]
        others = [record[SHUFFLED + name] for record in records if SHUFFLED + name in record]
        if values:
            rows.append(Row(name, values[0], values[-1], others[-1] if others else None))
    return rows


def event(record: dict[str, Any]) -> tuple[str, str, str, str]:
    """(step, time in UTC, what it was, the rest in words) of a record of metrics.EVENTS."""
    kind, step = record["kind"], record["step"]
    values = {name: value for name, value in record.items() if name not in _BOOKKEEPING and value not in (None, "")}
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record["time"])) if is_finite(record.get("time")) else ""
    said = str(values.pop("reason", "") or values.pop("message", ""))
    rest = ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in values.items())
    if kind == "incident" and "checkpoint" in record:  # not one that DeepSpeed left out by itself
        rest += f"; python -m pipeline.replay {incident_folder(Path('RUN'), step - 1)}"
    return number(step), when, _EVENTS[kind], "; ".join(part for part in (said, rest) if part)
