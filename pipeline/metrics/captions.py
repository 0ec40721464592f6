"""Caption metrics as the field computes them: BLEU, ROUGE-L, METEOR and SPICE by pycocoevalcap 1.2, and CIDEr-D.

The package and Java are optional: what cannot be computed without them is left out, with the reason in one line.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.metrics.cider import PLAIN_WORDS, DocumentFrequencies, cider_scores, plain_words
from pipeline.metrics.java import TIMEOUT_SECONDS, MetricMissing, meteor, package_folder, ptb_tokenize, spice
from pipeline.metrics.statistics import standard_error

METRICS = ("bleu", "rouge_l", "cider_d", "meteor", "spice")
IN_LOOP = ("cider_d",)  # needs neither the package nor Java
PTB = "PTB (official): Stanford CoreNLP 3.4.1 of pycocoevalcap 1.2, lower case, punctuation removed"

Id = Hashable


@dataclass(frozen=True)
class CaptionScores:
    """``values`` and, for each image, ``per_item`` by name: bleu_1 to bleu_4, rouge_l, cider_d, meteor, spice. An image
    whose SPICE is undefined has none.

    On the scale of pycocoevalcap: CIDEr-D 0 to 10, all others 0 to 1. BLEU and METEOR of all images are not means of
    the images', so only the others have ``standard_errors``. ``missing``: a line for each metric that was asked for and
    is not there; ``notes``: a line for each thing that makes values incomparable.
    """

    values: dict[str, float]
    standard_errors: dict[str, float | None]
    per_item: dict[str, dict[Id, float]]
    tokenization: str
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def caption_scores(
    predictions: Mapping[Id, str],
    references: Mapping[Id, Sequence[str]],
    metrics: Sequence[str] = METRICS,
    frequencies: DocumentFrequencies | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> CaptionScores:
    """Scores of one caption per image against the image's references, in the order of ``predictions``.

    ``frequencies`` are those of CIDEr-D, by default the references'. Each Java program may take ``timeout_seconds``.
    Raises ValueError, in one line that names the image, for unequal ids, an image without references, and an unknown
    metric.
    """
    _check(predictions, references, metrics)
    captions = list(predictions.values())
    wanted = [list(references[key]) for key in predictions]
    tokenized_by, captions, wanted = _tokenized(captions, wanted, timeout_seconds)
    values: dict[str, float] = {}
    errors: dict[str, float | None] = {}
    per_item: dict[str, dict[Id, float]] = {}
    missing: list[str] = []
    for metric in metrics:
        try:
            found = _score(metric, captions, wanted, frequencies, timeout_seconds)
        except MetricMissing as error:
            missing.append(f"{metric}: {error}")
            continue
        for name, (value, of_images) in found.items():
            values[name] = float(value)
            scores = zip(predictions, map(float, of_images), strict=True)
            per_item[name] = {key: score for key, score in scores if not math.isnan(score)}
            if metric in ("rouge_l", "cider_d", "spice"):
                errors[name] = standard_error(list(per_item[name].values()))
    notes = _notes(per_item, len(captions), frequencies)
    return CaptionScores(values, errors, per_item, tokenized_by, missing, notes)


def tokenization() -> str:
    """How captions are tokenized on this machine, in words: ``CaptionScores.tokenization``."""
    return _tokenized(["a"], [["a"]], TIMEOUT_SECONDS)[0]


def _check(predictions: Mapping[Id, str], references: Mapping[Id, Sequence[str]], metrics: Sequence[str]) -> None:
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise ValueError(f"metric {unknown[0]!r}: expected some of {', '.join(METRICS)}")
    if not predictions:
        raise ValueError("no captions to score")
    for key in predictions:
        if key not in references:
            raise ValueError(f"image {key!r} has a caption but no references: expected both for each image")
        if isinstance(references[key], str) or not references[key]:
            raise ValueError(f"image {key!r}: references {references[key]!r}, expected a list of at least one")
    for key in references:
        if key not in predictions:
            raise ValueError(f"image {key!r} has references but no caption: expected both for each image")


def _tokenized(
    captions: list[str], references: list[list[str]], timeout_seconds: float
) -> tuple[str, list[str], list[list[str]]]:
    """The tokenization in words, and captions and references tokenized: by Java, or else by ``plain_words``."""
    flat = [text for of_image in references for text in of_image]
    try:
        words = iter(ptb_tokenize(flat, timeout_seconds))
        return PTB, ptb_tokenize(captions, timeout_seconds), [[next(words) for _ in of] for of in references]
    except MetricMissing as error:
        plain = [" ".join(plain_words(text)) for text in captions]
        plain_references = [[" ".join(plain_words(text)) for text in of_image] for of_image in references]
        return f"{PLAIN_WORDS}; not the official PTB tokenization ({error})", plain, plain_references


def _score(
    metric: str,
    captions: list[str],
    references: list[list[str]],
    frequencies: DocumentFrequencies | None,
    timeout_seconds: float,
) -> dict[str, tuple[float, Sequence[float]]]:
    """{name: (value, values of the images)} of a metric. Raises MetricMissing."""
    if metric == "cider_d":
        words = [caption.split() for caption in captions]
        scores = cider_scores(words, [[text.split() for text in of_image] for of_image in references], frequencies)
        return {"cider_d": (sum(scores) / len(scores), scores)}
    if metric == "meteor":
        return {"meteor": meteor(captions, references, timeout_seconds)}
    if metric == "spice":
        scores = spice(captions, references, timeout_seconds)
        if not (defined := [score for score in scores if not math.isnan(score)]):
            raise MetricMissing("neither a caption nor a reference says anything")
        return {"spice": (sum(defined) / len(defined), scores)}
    package_folder()
    found: Any = {number: [caption] for number, caption in enumerate(captions)}
    wanted: Any = dict(enumerate(references))
    if metric == "rouge_l":
        from pycocoevalcap.rouge.rouge import Rouge

        return {"rouge_l": Rouge().compute_score(wanted, found)}
    from pycocoevalcap.bleu.bleu import Bleu

    values, of_images = Bleu(4).compute_score(wanted, found, verbose=0)
    return {f"bleu_{n}": scores for n, scores in enumerate(zip(values, of_images, strict=True), start=1)}


def _notes(
    per_item: Mapping[str, Mapping[Id, float]], num_images: int, frequencies: DocumentFrequencies | None
) -> list[str]:
    notes = []
    if "cider_d" in per_item:
        if frequencies is not None:
            notes.append(f"CIDEr-D by fixed document frequencies of {frequencies.num_images:,} images")
        elif num_images == 1:
            notes.append("CIDEr-D of a single image is 0: every word occurs in all images, so none tells anything")
        else:
            notes.append(f"CIDEr-D by the document frequencies of these {num_images:,} images, not of another subset")
    if undefined := num_images - len(per_item.get("spice", range(num_images))):
        notes.append(f"SPICE of {undefined:,} of {num_images:,} images is undefined: they are left out of the mean")
    return notes
