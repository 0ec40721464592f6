"""The report of a run, one self-contained page with its curves, costs and captions."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from data_prep.manifest import write_atomically
from pipeline.config.options import leaves
from pipeline.incidents.records import incident_folder
from pipeline.recording.run_log import EVENTS, LOG_NAME, read_events, read_log
from pipeline.reporting.evaluations import Evaluation, EvaluationError, read_evaluations
from pipeline.reporting.figures import NUM_COLOURS, Series, draw

REPORT_NAME = "report.html"
SAMPLES_NAME = "samples.json"
SHUFFLED = "shuffled/"  # before the names of held-out numbers that were measured with other samples' images
TERM_COLOURS = {"flm": 0, "mlm": 0, "ar": 0, "prefixlm": 0, "l2r": 1, "r2l": 2, "itm": 3, "loss": 5}  # in every figure
EVENTS_SHOWN = 100  # the latest; log.jsonl has all
_BOOKKEEPING = {"kind", "step", "time"}
NOT_SCORES = {"seconds", "bad_samples"}  # of the records of evaluations


class ReportError(ValueError):
    """There is no run to report on."""


@dataclass
class Figure:
    """A titled figure; ``svg`` is inline and themed by the page's variables."""

    title: str
    note: str
    svg: Markup


@dataclass
class Row:
    """One held-out number: at the first and last evaluation, and at the last with shuffled images."""

    name: str
    first: float | None
    last: float | None
    shuffled: float | None


@dataclass
class Run:
    """What is known of a run; every part may be absent while it trains."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    deepspeed: dict[str, Any]
    train: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)


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
    if not run.config and not run.train and not run.held_out and not evaluations:
        raise ReportError(f"{run_dir} holds neither config.yaml nor {LOG_NAME}; give the --output of a training run")
    page = template("report.html.j2").render(
        run=run,
        evaluations=evaluations,
        facts=facts(run),
        tiles=tiles(run),
        rows=held_out_rows(run.held_out),
        evaluated=[run.held_out[0]["step"], run.held_out[-1]["step"]] if run.held_out else [],
        figures=[figure for figure in figures(run) if figure is not None],
        events=[event(record) for record in run.events[-EVENTS_SHOWN:]],
        environment=[pair for pair in leaves(run.environment) if not pair[0].startswith("better.")],
        config=yaml.safe_dump(run.config, sort_keys=False) if run.config else "",
        deepspeed=json.dumps(run.deepspeed, indent=2) if run.deepspeed else "",
    )
    path = run_dir / REPORT_NAME
    write_atomically(path, page)
    return path


def template(name: str) -> Template:
    """A page of templates/, everything escaped that it is given."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, signed=signed, percent=percent)
    return environment.get_template(name)


def evaluations_of(run_dir: Path) -> list[Evaluation]:
    try:
        return read_evaluations(run_dir)
    except EvaluationError as error:
        raise ReportError(str(error)) from None


def load_run(run_dir: Path) -> Run:
    """Reads the files of a run; absent ones are empty, unreadable ones an error naming the file."""
    records = read_log(run_dir / LOG_NAME)
    return Run(
        name=run_dir.resolve().name,
        config=_read(run_dir / "config.yaml", yaml.safe_load),
        environment=_read(run_dir / "environment.json", json.loads),
        deepspeed=_read(run_dir / "ds_config.json", json.loads),
        train=[record for record in records if record["kind"] == "train"],
        held_out=[record for record in records if record["kind"] == "eval"],
        events=read_events(run_dir / LOG_NAME),
        samples=_read(run_dir / SAMPLES_NAME, json.loads),
    )


def _read(path: Path, parse: Any) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, yaml.YAMLError) as error:
        raise ReportError(f"{path} cannot be read: {str(error).splitlines()[0]}; restore or remove it") from None
    return content if isinstance(content, dict) else {}


def number(value: Any) -> str:
    """A number for people: four significant digits, thousands apart."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.4g}"


def signed(value: float) -> str:
    """A difference for people, with its sign."""
    return f"{value:+.3f}".replace("-", "\u2212") if math.isfinite(value) else "not finite"


def percent(share: Any) -> str:
    """A share from 0 to 1 for people."""
    return f"{100 * share:.1f} %" if _finite(share) else number(share)


def duration(seconds: float) -> str:
    """A time span for people."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


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
    return found


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(value, label, note) of the few numbers a reader looks for first."""
    found = []
    steps = max((record["step"] for record in run.train + run.held_out), default=0)
    planned = run.config.get("train", {}).get("steps") if isinstance(run.config.get("train"), dict) else None
    if steps:
        found.append((number(steps), "steps", f"of {number(planned)}" if planned else ""))
    times = [record["time"] for record in run.train + run.held_out if "time" in record]
    if len(times) > 1:
        found.append((duration(max(times) - min(times)), "wall time", "first to last record"))
    rates = [record["samples_per_second"] for record in run.train if _finite(record.get("samples_per_second"))]
    if rates:
        found.append((number(sorted(rates)[len(rates) // 2]), "samples per second", "median over the run"))
    losses = [row for row in held_out_rows(run.held_out) if "loss" in row.name and row.first and row.last]
    if losses:
        row = min(losses, key=lambda row: (row.name not in ("loss", "flm_loss"), row.name))
        found.append((number(row.last), f"held-out {row.name.replace('_', ' ')}", f"from {number(row.first)}"))
    for name, value in run.samples.get("summary", {}).items():
        if isinstance(value, float):
            found.append((f"{100 * value:.1f} %", name.replace("_", " "), "held-out captions"))
    return found


def held_out_rows(records: list[dict[str, Any]]) -> list[Row]:
    """One row per held-out number, in the order in which they were logged."""
    rows = []
    for name in _names(records):
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
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record["time"])) if _finite(record.get("time")) else ""
    said = str(values.pop("reason", "") or values.pop("message", ""))
    rest = ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in values.items())
    if kind == "incident" and "checkpoint" in record:  # not one that DeepSpeed left out by itself
        rest += f"; python -m pipeline.replay {incident_folder(Path('RUN'), step - 1)}"
    return number(step), when, EVENTS[kind], "; ".join(part for part in (said, rest) if part)


def figures(run: Run) -> Iterable[Figure | None]:
    """Every figure that the records allow."""
    losses = [name for name in _names(run.train) if _is_loss(name)]
    yield _figure("Training loss", "mean over the targets of all ranks; the thick line is smoothed",
                  run.train, losses, smooth=True)  # fmt: skip
    yield from _held_out_figures(run)
    for title, note, accept in (
        (
            "Learning rate",
            "base; heads and cross-modal layers have multiples of it",
            lambda n: n.startswith("lr") or "learning_rate" in n,
        ),
        ("Gradient norm", "before clipping", lambda n: "grad_norm" in n),
        ("Throughput", "samples per second over all ranks", lambda n: n == "samples_per_second"),
        ("Predicted tokens", "targets per second over all ranks", lambda n: "tokens_per_second" in n),
        ("Waiting for data", "share of the step time", lambda n: "data_wait" in n),
        ("Model FLOP/s utilisation", "share of the device's dense peak", lambda n: "mfu" in n),
        ("Memory", "peak, GiB per rank", lambda n: "memory" in n or n.endswith("_gib")),
        ("Trouble", "unusable samples and skipped steps so far", lambda n: n in ("bad_samples", "skipped_steps")),
    ):
        yield _figure(title, note, run.train, [name for name in _names(run.train) if accept(name)], from_zero=True)


def _held_out_figures(run: Run) -> Iterable[Figure | None]:
    """Losses together, accuracies together, every other held-out number by itself; each says which way is better."""
    names = [name for name in _names(run.held_out) if name.removeprefix(SHUFFLED) not in NOT_SCORES]
    groups: dict[str, list[str]] = {}
    for name in names:
        quantity = next((word for word in ("loss", "accuracy") if word in name), name.removeprefix(SHUFFLED))
        groups.setdefault(quantity, []).append(name)
    for quantity, members in groups.items():
        better = {better_way(run, name) for name in members} - {None}
        note = f"{better.pop()} is better" if len(better) == 1 else ""
        if any(name.startswith(SHUFFLED) for name in members):
            note += "; dashed: with another sample's image"
        yield _figure(f"Held-out {quantity.replace('_', ' ')}", note, run.held_out, members)


def better_way(run: Run, name: str) -> str | None:
    """Which way is better, "lower" or "higher", as the run's task says; older runs have losses and accuracies only."""
    said = run.environment.get("better")
    if isinstance(said, dict):
        return said.get(name.removeprefix(SHUFFLED))
    return "higher" if name.endswith("accuracy") else "lower" if "loss" in name else None


def _is_loss(name: str) -> bool:
    return "loss" in name and "scale" not in name or name in TERM_COLOURS


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _names(records: list[dict[str, Any]]) -> list[str]:
    """Names of the numbers of the records, in order of first appearance."""
    names = {name: None for record in records for name, value in record.items() if isinstance(value, (int, float))}
    return [name for name in names if name not in _BOOKKEEPING]


def _figure(
    title: str,
    note: str,
    records: list[dict[str, Any]],
    names: list[str],
    smooth: bool = False,
    from_zero: bool = False,
) -> Figure | None:
    series = []
    bases = list(dict.fromkeys(name.removeprefix(SHUFFLED) for name in names))
    for name in names:
        points = [(record["step"], float(record[name])) for record in records if _finite(record.get(name))]
        if points:
            steps, values = zip(*points, strict=True)
            base = name.removeprefix(SHUFFLED)
            term = base.removesuffix("_loss").removesuffix("_accuracy")
            colour = TERM_COLOURS.get(term, bases.index(base) % NUM_COLOURS)
            label = "total" if term == "loss" else term.replace("_", " ")
            series.append(Series(label, list(steps), list(values), colour, name.startswith(SHUFFLED)))
    if not any(any(one.values) for one in series):
        return None
    return Figure(title, note, draw(title, series, smooth, from_zero))
