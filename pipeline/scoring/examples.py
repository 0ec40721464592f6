"""Examples of an evaluation for people: pictures, texts, predictions, and where the text attended in the picture."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.manifest import write_atomically
from model.attention_maps import on_grid, text_attention_map, word_attention
from model.batch import Planner, Row
from model.vision.tower import Grid, grid_of
from pipeline.config.options import Config, reads_by_language_model
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.transforms import UnusableSample
from pipeline.finetuning.retrieval import Gallery, matrix
from pipeline.loading.datasets import Preparation
from pipeline.metrics import recall
from pipeline.pictures.pictures import pictures_of
from pipeline.scoring.confusion import of_answers, of_labels, recall_curves
from pipeline.scoring.merges import NOTE, merge_pictures
from pipeline.tasks.captioning import thumbnail
from pipeline.tasks.task import Prediction

EXAMPLES = "examples.json"
FORMAT_VERSION = 1
NO_GRID = "no attention: where the tokens of this vision tower stand in the image is not known"
NO_TEXT = "no attention: this task reads no text through layers that see the image"
MAPS = "attention: mean over the heads and the top layers"


@dataclass
class Example:
    """What is shown of a prediction; ``read`` is the text whose attention is drawn, None for that of the sample.

    ``right`` is None where nothing is right or wrong; ``token_ids`` are ``read`` as tokens, where it is known as such.
    """

    position: int
    right: bool | None
    text: str
    prediction: str
    truth: list[str] = field(default_factory=list)
    note: str = ""
    read: str | None = None
    token_ids: list[int] | None = None


def write_examples(
    folder: Path,
    task_name: str,
    config: Config,
    objective: nn.Module,
    preparation: Preparation,
    corpora: Sequence[Corpus],
    rows: Sequence[tuple[int, int]],
    predictions: Sequence[Prediction],
    shown: int = 24,
) -> Path | None:
    """Write FOLDER/examples.json: ``shown`` predictions, half of them right, and what was taken for what over all.

    ``rows`` are (corpus, row) of each position (``EvalDataset.rows``), ``predictions`` those of the first pass, as
    their task summarised them. None, and no file, for a task that this file does not know. ``objective`` is in
    evaluation mode and whole in this process.
    """
    found = _examples(task_name, corpora, rows, preparation, predictions)
    if found is None:
        return None
    examples, statistics = found
    chosen = [examples[number] for number in choose([one.right for one in examples], shown)]
    show = _Show(task_name, config, objective, preparation, grid_of(objective.net.vision))
    pictured = []
    for one in chosen:
        corpus, row = rows[one.position]
        try:
            sample = corpora[corpus].read(row)
            images = show.images(sample)
        except UnusableSample:  # counted by the evaluation
            continue
        pictured.append(show.entry(one, sample, images))
    content = {"format_version": FORMAT_VERSION, "task": task_name, "items": len(examples), "note": show.note}
    path = folder / EXAMPLES
    write_atomically(path, json.dumps(content | statistics | {"examples": pictured}) + "\n")
    return path


def choose(right: Sequence[bool | None], shown: int) -> list[int]:
    """Numbers of ``shown`` examples, spread evenly over the right ones and over the others, as many of either.

    Where one kind has too few, the other has more; what is neither right nor wrong is spread over all.
    """
    kinds = [[number for number, one in enumerate(right) if (one is False) == wrong] for wrong in (True, False)]
    wrong = min(len(kinds[0]), max(shown // 2, shown - len(kinds[1])))
    counts = [wrong, min(len(kinds[1]), shown - wrong)]
    return sorted(
        numbers[index * len(numbers) // count] for numbers, count in zip(kinds, counts) for index in range(count)
    )


@dataclass
class _Show:
    """Makes the entries; the images are those that the model saw."""

    task: str
    config: Config
    objective: nn.Module
    preparation: Preparation
    grid: Grid | None
    note: str = MAPS

    def images(self, sample: RawSample) -> Tensor:
        """uint8 [I, 3, S, S], images or the frames of a clip; raises UnusableSample."""
        return pictures_of(self.config).of(sample)

    def entry(self, example: Example, sample: RawSample, images: Tensor) -> dict[str, Any]:
        """What examples.json holds of an example."""
        pictures: list[dict[str, Any]] = [{"thumbnail": thumbnail(image)} for image in images]
        words: list[dict[str, Any]] = []
        planned = self._rows(example, sample)
        merges = [] if sample.video is not None else merge_pictures(self.objective.net, images[0], self.grid)
        if self.grid is None or planned is None:
            self.note = NO_GRID if self.grid is None else NO_TEXT
        else:
            words = self._draw(pictures, *planned, images)
        self.note = NOTE if merges else self.note
        names = ("right", "text", "prediction", "truth", "note")
        shown = {name: getattr(example, name) for name in names}
        return {"key": sample.key, **shown, "images": pictures, "words": words, "merges": merges}

    def _rows(self, example: Example, sample: RawSample) -> tuple[list[Row], Planner] | None:
        """What the model reads of an example, and who plans it; None where it reads nothing."""
        maker, length = self.preparation.maker, self.config.data.max_text_length
        if reads_by_language_model(self.config):
            return None
        if self.task == "captioning":
            words = maker.tokenizer.encode(example.read, length)[1:-1]
            return [Row(self.objective.form.write(words, length), 0, 0, "pair", sample.key)], self.objective.planner(0)
        if self.task == "retrieval":
            planner = getattr(self.objective, "reading_planner", self.preparation.planner)
            return [Row(example.token_ids, 0, 0, "read", sample.key)], planner
        rows = maker.rows(sample, 0, None)
        if getattr(self.config.task, "generative", False):
            rows = [_question(row) for row in rows]
        return (rows, self.preparation.planner) if all(len(row.token_ids) > 1 for row in rows) else None

    def _draw(
        self, pictures: list[dict[str, Any]], rows: list[Row], planner: Planner, images: Tensor
    ) -> list[dict[str, Any]]:
        """Puts the attention of the rows beside their pictures; returns that of each word of a caption."""
        device = next(self.objective.parameters()).device
        batch = planner(images[None], rows).to(device)
        if batch.plan is None:
            self.note = NO_TEXT
            return []
        attention = word_attention(self.objective.net, batch).cpu()
        whole = text_attention_map(attention, batch.plan.lengths.tolist())
        for row, found in zip(rows, whole, strict=True):
            pictures[row.image]["attention"] = _small(on_grid(found, self.grid))
            pictures[row.image]["elsewhere"] = round(float(found[: self.grid.leading].sum()), 4)
        if self.task != "captioning":
            return []
        tokenizer, ids = self.preparation.maker.tokenizer, rows[0].token_ids
        pieces = [(place, tokenizer.decode([one])) for place, one in enumerate(ids[1:], 1) if self._is_word(one)]
        # the state that a word is predicted from stands before it
        return [
            {"word": piece, "attention": _small(on_grid(attention[0, place - 1], self.grid))}
            for place, piece in pieces
            if piece and attention[0, place - 1].any()
        ]

    def _is_word(self, token: int) -> bool:
        return token < self.preparation.maker.tokenizer.vocabulary.size


def _question(row: Row) -> Row:
    """A question without the answer after it, whose states are computed because its end is predicted."""
    asked = row.token_ids[: -1 if row.target is None else row.target]
    return dataclasses.replace(row, token_ids=[*asked, row.token_ids[-1]], role="pair", target=len(asked))


def _small(grid: Tensor) -> dict[str, Any]:
    """A grid of shares as bytes of its largest; ``largest`` is that share itself."""
    largest = float(grid.max())
    values = (grid / max(largest, 1e-12) * 255).round().to(torch.uint8).numpy()
    text = base64.b64encode(values.tobytes()).decode("ascii")
    return {"height": values.shape[0], "width": values.shape[1], "values": text, "largest": round(largest, 6)}


def _examples(
    task: str,
    corpora: Sequence[Corpus],
    rows: Sequence[tuple[int, int]],
    preparation: Preparation,
    predictions: Sequence[Prediction],
) -> tuple[list[Example], dict[str, Any]] | None:
    """Every prediction as an example, and what is counted over all; None for a task that is not known here."""
    if task in ("vqa", "gqa", "okvqa"):
        return [_answer(one) for one in predictions], of_answers(predictions)
    if task in ("nlvr2", "snli_ve"):
        return [_label(one) for one in predictions], of_labels(predictions)
    if task == "captioning":
        return [_caption(one) for one in predictions], {}
    if task == "retrieval":
        return _retrieved(predictions, Gallery(list(corpora), list(rows), preparation.maker))
    return None


def _answer(one: Mapping[str, Any]) -> Example:
    given = [f"{answer} ({count})" for answer, count in Counter(one.get("answers") or ()).most_common()]
    note = f"confidence {one['confidence']:.2f}" if "confidence" in one else ""
    right = None
    if "score" in one:
        right, note = one["score"] >= 0.5, ", ".join(filter(None, (f"accuracy {one['score']:.2f}", note)))
    return Example(one["position"], right, one["question"], one["answer"], given, note)


def _label(one: Mapping[str, Any]) -> Example:
    probability = one["probabilities"][one["prediction"]] if "probabilities" in one else one["probability"]
    if "probabilities" not in one and one["prediction"] == "False":
        probability = 1 - probability
    truth = [one["label"]] if "label" in one else []
    text = one["sentence"] if "sentence" in one else one["hypothesis"]
    return Example(
        one["position"], one.get("correct"), text, one["prediction"], truth, f"probability {probability:.2f}"
    )


def _caption(one: Mapping[str, Any]) -> Example:
    score = one.get("cider_d")
    note = "" if score is None else f"CIDEr-D {score:.2f}"
    return Example(
        one["position"], None, "", one["caption"], list(one.get("references") or ()), note, read=one["caption"]
    )


def _retrieved(predictions: Sequence[Prediction], gallery: Gallery) -> tuple[list[Example], dict[str, Any]]:
    """The best captions of each image, and recall over k."""
    owner, maker = gallery.image_of_caption, gallery.maker
    owners, scores = matrix(list(predictions), owner)
    found = recall.ranks(scores, owners)
    examples = []
    for one in predictions:
        own = owner == one["position"]
        if not own.any():
            continue
        order = np.argsort(-one["_scores"], kind="stable")
        best, rank = int(order[0]), int(np.flatnonzero(own[order])[0]) + 1
        texts = [maker.tokenizer.decode(gallery.token_ids[number]) for number in (best, *np.flatnonzero(own))]
        note = f"first own caption at rank {rank} of {len(owner)}"
        ids = gallery.token_ids[best]
        examples.append(Example(one["position"], bool(own[best]), "", texts[0], texts[1:], note, token_ids=ids))
    return examples, {"recall": recall_curves(found)}
