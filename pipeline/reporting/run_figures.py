"""The figures of one run: losses, held-out numbers, cost; with what happened to the run marked on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipeline.reporting.figures import FEW, NUM_COLOURS, Series, draw, smoothing
from pipeline.reporting.formats import is_finite, spoken
from pipeline.reporting.reading import NOT_SCORES, SHUFFLED, Run, better_way, names_of

TERM_COLOURS = {"flm": 0, "mlm": 0, "ar": 0, "prefixlm": 0, "l2r": 1, "r2l": 2, "itm": 3, "loss": 5}  # in every figure
_MATCHING = {"itm", "itc"}  # terms whose losses are not those of words: about 0.7 where words have 7


@dataclass
class Figure:
    """A titled figure; ``svg`` is inline and themed by the page's variables."""

    title: str
    note: str
    svg: Markup


def figures(run: Run) -> Iterable[Figure | None]:
    """Every figure that the records allow."""
    losses = [name for name in names_of(run.train) if is_loss(name)]
    matching = [name for name in losses if _term(name) in _MATCHING]
    words = [name for name in losses if name not in matching]
    said = f"thin: each line of the log; thick: exponential mean over {smoothing(len(run.train)):.0f} of them"
    note = f"mean over the targets of all ranks{f'; {said}' if len(run.train) > FEW else ''}"
    yield _figure(run, "Training loss", note, run.train, words, smooth=True)
    yield _figure(run, "Training loss of matching", f"a pair at a time, not a word; {note}", run.train, matching, True)
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
        ("Waiting for data", "share of the step time", lambda n: n == "data_wait_share"),
        ("Model FLOP/s utilisation", "share of the device's dense peak", lambda n: "mfu" in n),
        ("Memory", "peak, GiB per rank", lambda n: "memory" in n or n.endswith("_gib")),
        ("Trouble", "unusable samples and skipped steps so far", lambda n: n in ("bad_samples", "skipped_steps")),
    ):
        names = [name for name in names_of(run.train) if accept(name)]
        yield _figure(run, title, note, run.train, names, from_zero=True)


def _held_out_figures(run: Run) -> Iterable[Figure | None]:
    """Losses together but for matching's, accuracies together, scores of a kind together; each says what is better."""
    names = [name for name in names_of(run.held_out) if name.removeprefix(SHUFFLED) not in NOT_SCORES]
    groups: dict[str, list[str]] = {}
    for name in names:
        if not name.endswith("_standard_error"):
            groups.setdefault(_quantity(name.removeprefix(SHUFFLED)), []).append(name)
    for quantity, members in groups.items():
        better = {better_way(run, name) for name in members} - {None}
        notes = [f"{better.pop()} is better"] if len(better) == 1 else []
        if any(name.startswith(SHUFFLED) for name in members):
            notes.append("dashed: with another sample's image")
        yield _figure(run, f"Held-out {spoken(quantity)}", "; ".join(notes), run.held_out, members)


def _quantity(name: str) -> str:
    """What can share an axis has one name here."""
    if "loss" in name:
        return "loss of matching" if _term(name) in _MATCHING else "loss"
    return next((word for word in ("accuracy", "bleu", "cider_d") if word in name), name)


def _term(name: str) -> str:
    return name.removeprefix(SHUFFLED).removesuffix("_loss").removesuffix("_accuracy")


def without_repeated_total(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """The names without ``loss`` where it is another one of them in every record: the total of a single term."""
    others = [name for name in names if name != "loss"]
    equal = any(all(one.get("loss") == one.get(name) for one in records) for name in others)
    return others if "loss" in names and equal else list(names)


def is_loss(name: str) -> bool:
    return "loss" in name and "scale" not in name or name in TERM_COLOURS


def _figure(
    run: Run,
    title: str,
    note: str,
    records: Sequence[dict[str, Any]],
    names: Sequence[str],
    smooth: bool = False,
    from_zero: bool = False,
) -> Figure | None:
    series, names = [], without_repeated_total(records, names)
    bases = list(dict.fromkeys(name.removeprefix(SHUFFLED) for name in names))
    for name in names:
        points = [(record["step"], float(record[name])) for record in records if is_finite(record.get(name))]
        if points:
            steps, values = zip(*points, strict=True)
            base = name.removeprefix(SHUFFLED)
            term = _term(base)
            colour = TERM_COLOURS.get(term, bases.index(base) % NUM_COLOURS)
            label = "total" if term == "loss" else spoken(term)
            series.append(Series(label, list(steps), list(values), colour, name.startswith(SHUFFLED)))
    if not any(any(one.values) for one in series):
        return None
    return Figure(title, note, draw(title, series, smooth, from_zero, marks=run.course.marks))
