"""Reads SNLI-VE (snli_ve_{train,dev,test}.jsonl): hypotheses about images of Flickr30k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import Annotated, AnnotatedSplit
from data_prep.annotations.files import BadEntry, file_name, read_json_lines, text
from data_prep.annotations.published import as_published
from data_prep.record import PrepError, Rejection

LABELS = ("entailment", "neutral", "contradiction")
SPLITS = ("train", "dev", "test")
_EXPECTED = "SNLI-VE as in snli_ve_train.jsonl"


def read_snli_ve(path: Path, split: str | None = None) -> AnnotatedSplit:
    """A split of SNLI-VE, all hypotheses of an image together, in the file's order.

    ``split`` is by default what the file's name ends in. Raises PrepError.
    """
    split = split or path.stem.rpartition("_")[2]
    if split not in SPLITS:
        raise PrepError(f"{path}: its name ends in none of {', '.join(SPLITS)}; name its split by --split")
    images: dict[str, Annotated] = {}
    problems: list[Rejection] = []
    seen: set[str] = set()
    counts = {"hypotheses": 0, "images": 0, **dict.fromkeys(LABELS, 0)}
    for line in read_json_lines(path, _EXPECTED):
        counts["hypotheses"] += 1
        if isinstance(line, Rejection):
            problems.append(line)
            continue
        name, entry = line
        try:
            counts[_add(entry, images, seen)] += 1
        except BadEntry as error:
            shown = ascii(entry["pairID"]).strip("'")[:80] if isinstance(entry.get("pairID"), str) else ""
            problems.append(Rejection(error.reason, f"{name}: {shown}" if shown else name, error.detail))
    counts["images"] = len(images)
    return AnnotatedSplit(split, list(images.values()), problems, counts)


def label_revision(split: AnnotatedSplit) -> str:
    """Which labels a split has: "original" where their counts are the published ones, else "other"."""
    return "original" if as_published("snli_ve", split.split, split.counts) else "other"


def _add(entry: dict[str, Any], images: dict[str, Annotated], seen: set[str]) -> str:
    pair_id, hypothesis, label = text(entry, "pairID"), text(entry, "sentence2"), text(entry, "gold_label")
    if label not in LABELS:
        raise BadEntry("unknown_label", f"gold_label {ascii(label)[:40]}, expected one of {', '.join(LABELS)}")
    if pair_id in seen:
        raise BadEntry("duplicate_id", "its pairID comes again; the earlier one counts")
    seen.add(pair_id)
    image_id = file_name(entry, "Flikr30kID").removesuffix(".jpg")  # spelt so in the files
    if image_id not in images:
        file = f"{image_id}.jpg"
        names = (file, f"flickr30k_images/{file}", f"flickr30k-images/{file}")
        images[image_id] = Annotated(image_id, (names,), (f"flickr/{image_id}",), {"image_id": image_id})
    images[image_id].add(hypothesis, label=label, pair_id=pair_id)
    return label
