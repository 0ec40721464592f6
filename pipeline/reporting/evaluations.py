"""What the report shows of each evaluation of a run: scorecard, examples with their attention, confusion, recall."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from pipeline.config.options import leaves
from pipeline.reporting.figures import Series, draw

FOLDER, SCORECARD, EXAMPLES = "evaluations", "scorecard.json", "examples.json"
DARKEST = 205  # of 255: how dark the picture becomes where nothing was attended
MAX_CELLS = 4096  # of a map
GROUPS = ((False, "Wrong"), (True, "Right"), (None, "Examples"))
_SHOWN_ELSEWHERE = {"metrics", "standard_errors", "task", "split", "corpora", "format_version", "versions", "data"}


class EvaluationError(ValueError):
    """A file of an evaluation cannot be read; one line that names it."""


@dataclass
class Picture:
    """A JPEG in base64, and where the text attended as a PNG of shadows in base64, "" where that is not known."""

    thumbnail: str
    shadows: str
    elsewhere: float | None


@dataclass
class Example:
    """A prediction to show; ``words`` are pairs of a word and its shadows, ``merges`` pictures with what they show."""

    key: str
    text: str
    prediction: str
    truth: list[str]
    note: str
    pictures: list[Picture]
    words: list[tuple[str, str]]
    merges: list[tuple[str, str]]


@dataclass
class Matrix:
    """Counts by truth (rows) and prediction, with each count's share of its row; None where nothing is to be said."""

    title: str
    names: list[str]
    rows: list[list[tuple[int, float] | None]]


@dataclass
class Evaluation:
    """An evaluation as the page shows it; ``groups`` are titled lists of examples."""

    name: str
    card: dict[str, Any]
    measures: list[tuple[str, Any, Any]]  # name, value, standard error
    facts: list[tuple[str, Any]]
    note: str = ""
    groups: list[tuple[str, list[Example]]] = field(default_factory=list)
    types: list[dict[str, Any]] = field(default_factory=list)
    confusion: list[Matrix] = field(default_factory=list)
    recall: Markup | None = None

    @property
    def title(self) -> str:
        """Task, corpora and split, for people; and whose images, where they are not the own ones."""
        corpora = ", ".join(map(str, self.card.get("corpora") or []))
        options = self.card.get("options")
        images = options.get("images", "own") if isinstance(options, dict) else "own"
        parts = (self.card.get("task"), corpora, self.card.get("split"), images != "own" and f"images {images}")
        return " · ".join(str(part) for part in parts if part)


def read_evaluations(run_dir: Path) -> list[Evaluation]:
    """Those of RUN/evaluations that have a scorecard, by name; raises EvaluationError for files that say nonsense."""
    folders = sorted(path.parent for path in (run_dir / FOLDER).glob(f"*/{SCORECARD}"))
    return [_read_evaluation(folder) for folder in folders]


def _read_evaluation(folder: Path) -> Evaluation:
    card, content = (_read(folder / name) for name in (SCORECARD, EXAMPLES))
    try:
        errors = card.get("standard_errors") or {}
        measures = [(name, value, errors.get(name)) for name, value in card["metrics"].items()]
        evaluation = Evaluation(folder.name, card, measures, _facts(card))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _nonsense(folder / SCORECARD, error) from None
    try:
        if content:
            _add_examples(evaluation, content)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise _nonsense(folder / EXAMPLES, error) from None
    return evaluation


def _nonsense(path: Path, error: Exception) -> EvaluationError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return EvaluationError(f"{path} is not what an evaluation writes ({reason}); evaluate again, or remove it")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise _nonsense(path, error) from None
    if not isinstance(content, dict):
        raise _nonsense(path, ValueError(f"found a {type(content).__name__}"))
    return content


def _facts(card: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """How the numbers were made, in the order of the scorecard."""
    shown = {
        name: value for name, value in card.items() if name not in _SHOWN_ELSEWHERE and value not in (None, {}, [])
    }
    return [(name.replace("_", " "), value) for name, value in leaves(shown) if value is not None]


def _add_examples(evaluation: Evaluation, content: Mapping[str, Any]) -> None:
    evaluation.note = str(content.get("note", ""))
    found = [(one.get("right"), _example(one)) for one in content.get("examples", [])]
    for right, title in GROUPS:
        group = [example for is_right, example in found if is_right is right]
        if group:
            evaluation.groups.append((title, group))
    evaluation.types = [dict(one) for one in content.get("types", [])]
    items = sum(one["items"] for one in evaluation.types)
    for one in evaluation.types:
        one["share"] = one["items"] / items if items else math.nan
    evaluation.confusion = [_matrix(one) for one in content.get("confusion", [])]
    if content.get("recall"):
        evaluation.recall = _recall(evaluation.name, content["recall"])


def _example(one: Mapping[str, Any]) -> Example:
    pictures = [
        Picture(str(image["thumbnail"]), shadows(image.get("attention")), image.get("elsewhere"))
        for image in one["images"]
    ]
    words = [(str(word["word"]), shadows(word["attention"])) for word in one.get("words", [])]
    texts = (str(one.get(name) or "") for name in ("key", "text", "prediction"))
    truth = [str(truth) for truth in one.get("truth", [])]
    merges = [
        (f"layer {int(each['layer'])}: {int(each['tokens'])} tokens", str(each["thumbnail"]))
        for each in one.get("merges", [])
    ]
    return Example(*texts, truth, str(one.get("note", "")), pictures, words, merges)


def shadows(attention: Mapping[str, Any] | None) -> str:
    """The map as a PNG in base64, black and the less opaque the more was attended; "" for none.

    Raises ValueError for values that are not height x width bytes.
    """
    if attention is None:
        return ""
    height, width = int(attention["height"]), int(attention["width"])
    values = base64.b64decode(attention["values"], validate=True)
    if not 0 < height * width <= MAX_CELLS or len(values) != height * width:
        raise ValueError(f"a map of {height} x {width} with {len(values)} values")
    pixels = b"".join(bytes((0, DARKEST - value * DARKEST // 255)) for value in values)
    buffer = io.BytesIO()
    Image.frombytes("LA", (width, height), pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _matrix(one: Mapping[str, Any]) -> Matrix:
    names, rows = [str(name) for name in one["names"]], []
    for counts in one["counts"]:
        total = sum(count or 0 for count in counts)
        rows.append([None if count is None else (int(count), count / total if total else 0.0) for count in counts])
    if len(rows) != len(names) or any(len(row) != len(names) for row in rows):
        raise ValueError(f"a matrix of {len(names)} names with {len(rows)} rows")
    return Matrix(str(one["title"]), names, rows)


def _recall(name: str, curves: Mapping[str, Any]) -> Markup | None:
    ks = [int(k) for k in curves["k"]]
    series = [
        Series(label, ks, [float(value) for value in curves[label]], colour)
        for colour, label in enumerate(("image to text", "text to image"))
    ]
    return draw(f"Recall of {name}", series, from_zero=True, axis="k, number of candidates looked at") if ks else None
