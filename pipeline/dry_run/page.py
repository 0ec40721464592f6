"""A dry run as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.command_line import describe
from pipeline.config.options import flatten
from pipeline.dry_run.outlook import Outlook
from pipeline.dry_run.stages import Stage
from pipeline.planning.summary import GIB, in_gib, parts_of

WIDTH = 118


def page(outlook: Outlook) -> str:
    """Everything but the time."""
    sections = (
        ("Settings that differ from the defaults", [describe(outlook.launch)]),
        ("Data", list(_data(outlook))),
        ("Parameters", list(_parameters(outlook))),
        (f"Memory of a rank, {outlook.ranks} rank{'s' if outlook.ranks > 1 else ''}", list(_memory(outlook))),
        ("Length", list(_length(outlook))),
        ("What is written", list(_written(outlook))),
        ("Settings at their defaults", list(_defaults(outlook))),
    )
    return "\n\n".join("\n".join([title, *_indented(lines)]) for title, lines in sections if lines)


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for text in lines for line in text.split("\n")]


def _data(outlook: Outlook) -> Iterator[str]:
    for one in outlook.data:
        head = f"{one['name']} {one['split']}"
        yield (
            f"{head}: {one['missing']}"
            if "missing" in one
            else (f"{head}: {one['samples']:,} samples in {one['shards']:,} shard{'s' if one['shards'] > 1 else ''}")
        )
    if outlook.samples is not None and not outlook.held_out:
        yield f"nothing is held out: no split {outlook.config.data.eval_split!r} (data.eval_split)"


def _parameters(outlook: Outlook) -> Iterator[str]:
    if outlook.parameters is None:
        yield "not known, see below"
        return
    yield outlook.parameters["table"]
    yield outlook.vocabulary
    if outlook.operations is not None:
        yield f"a sample costs {outlook.operations / 1e9:,.3g} GFLOP, forward and backward"


def _memory(outlook: Outlook) -> Iterator[str]:
    device = outlook.device
    room = "memory unknown" if device.memory_bytes is None else f"{device.memory_bytes / GIB:.1f} GiB for a rank"
    yield f"{device.name} ({device.kind}), {room}{' now' if device.kind == 'cpu' else ''}"
    if not outlook.stages:
        yield "not known, see below"
        return
    size = outlook.config.optim.micro_batch_size
    for one in outlook.stages:
        mark = "*" if one.stage == outlook.set_up_stage else " "
        if one.memory is None:
            yield f"{mark} ZeRO {one.stage}  refused: {one.refused}"
            continue
        fits = {None: "", True: "fits", False: "DOES NOT FIT"}[one.fits]
        shape = f"{size} x {one.accumulation}"
        yield (
            f"{mark} ZeRO {one.stage}  {one.precision:<5} micro-batch {shape:<10} {one.memory.peak / GIB:>7.2f} GiB"
            f"  {fits}"
        )
    chosen = outlook.chosen
    if chosen is not None and chosen.memory is not None:
        yield from _by_part(chosen)
    if device.kind == "cpu":
        yield (f"for GPUs: python -m pipeline.plan --recipe {outlook.launch.recipe} --gpus N --gpu-memory GIB")


def _by_part(chosen: Stage) -> Iterator[str]:
    yield f"* as set up, in {chosen.memory.moment}, GiB: {in_gib(parts_of(chosen.memory))}"
    if chosen.memory.host:
        yield f"  on its node for each rank, GiB: {in_gib(chosen.memory.host)}"


def _length(outlook: Outlook) -> Iterator[str]:
    train, size = outlook.config.train, outlook.config.optim.batch_size
    if not outlook.steps_known:
        yield f"{train.epochs:g} epochs; how many steps is not known without the data"
        return
    samples = train.steps * size
    yield f"{train.steps:,} steps of {size:,} samples, {samples:,} samples, about {outlook.tokens:,} text tokens"
    if outlook.epochs is not None:
        yield f"{outlook.epochs:.2f} epochs of {outlook.samples:,} samples"
    source = "of the texts found" if outlook.samples is not None else "assumed, as in Conceptual Captions"
    yield f"{outlook.text_tokens:.1f} tokens a text, both ends counted, {source}"


def _written(outlook: Outlook) -> Iterator[str]:
    folder, found = outlook.folder, outlook.checkpoints
    step = folder["step"]
    yield (
        f"{folder['path']}: "
        + {
            "new": "a new folder",
            "begins": "is there without a checkpoint; the run begins at step 0",
            "resumes": f"resumes after step {step}",
            "done": f"has done all its {step} steps; nothing is trained",
            "another run": f"holds another run, at step {step}; this one is refused",
        }[folder["state"]]
    )
    yield from (f"goes on with {change}" for change in folder.get("changes", ()))
    if "note" in folder:
        yield folder["note"]
    if not outlook.steps_known:
        return
    each = "" if found["bytes"] is None else f" of {_bytes(found['bytes'])}"
    most = "" if found["bytes"] is None else f", {_bytes(found['most_bytes'])} while the next one is written"
    yield f"{found['saves']} checkpoints{each}, {found['kept']} stay{most}; {_bytes(found['free_bytes'])} are free"


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"


def _defaults(outlook: Outlook) -> Iterator[str]:
    """All others, section by section, as many on a line as there is room for."""
    by_section: dict[str, list[str]] = {}
    for name, value in flatten(outlook.launch.config):
        if name not in outlook.launch.sources:
            section, _, option = name.rpartition(".")
            by_section.setdefault(section, []).append(f"{option} {value}")
    for section, words in by_section.items():
        line = f"{section}:"
        for word in words:
            if len(line) + len(word) > WIDTH:
                yield line
                line = "   "
            line += f" {word},"
        yield line.rstrip(",")


def time_section(outlook: Outlook, time: Mapping[str, Any] | None) -> str:
    """How long it takes and how that is known; what is wrong, last."""
    lines = ["Time", *_indented(list(_time(outlook, time)))]
    if outlook.problems:
        lines += ["", "The run would be refused", *_indented(outlook.problems)]
    return "\n".join(lines)


def _time(outlook: Outlook, time: Mapping[str, Any] | None) -> Iterator[str]:
    if not outlook.steps_known:
        yield "not known without the data, as the run goes by epochs"
        return
    if time is None:
        yield "not known before it is measured: --dry-run-steps 10, or --dry-run-samples-per-second X"
        return
    rate = outlook.config.optim.batch_size / time["step_seconds"]
    how = {
        "measured": f"measured over {len(time.get('measured_steps', ()))} steps on what is here",
        "given": "the throughput given",
        "model": "the planner's model of this GPU, not measured (docs/scaling.md)",
    }[time["source"]]
    yield f"{hours(time['total_seconds'])}; {how}: {time['step_seconds']:.3f} s a step, {rate:,.1f} samples/s"
    parts = time["seconds"]
    yield (
        f"start {hours(parts['start'])}, {time['steps']:,} steps {hours(parts['steps'])}, {time['evaluations']}"
        f" evaluations {hours(parts['evaluations'])}, {time['saves']} saves {hours(parts['saves'])}"
    )
    if time["source"] != "measured":
        yield "start and saves not counted; an evaluated sample as a third of a trained one, generated texts as nothing"
        return
    loading = time["loading_seconds_per_step"]
    if loading is not None:
        limit = "which is the limit: more data.num_workers" if loading >= time["step_seconds"] else "beside the steps"
        yield f"loading needs {loading:.3f} s for a step, {limit}"
    yield f"the largest rank had {time['peak_bytes'] / GIB:.2f} GiB at most"


def hours(seconds: float) -> str:
    """A duration in the unit that people would use."""
    for name, unit in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"
