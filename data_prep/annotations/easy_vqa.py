"""Reads easy-VQA (github.com/vzhou842/easy-VQA): questions about one coloured shape, in the form of VQAv2's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import Annotated, AnnotatedSplit
from data_prep.annotations.files import is_utf8, read_json
from data_prep.annotations.vqav2 import NUM_ANSWERS
from data_prep.record import PrepError, Rejection

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")


def read_easy_vqa(folder: Path, dev_share: float, seed: int = 0) -> tuple[list[AnnotatedSplit], dict[str, int]]:
    """The splits of easy-VQA and the counts of its training file, of whose images ``dev_share`` become ``dev``.

    Images lie in FOLDER/SPLIT/images. A test split is there if FOLDER/test is. Raises PrepError.
    """
    whole = _read(folder / "train", "train")
    held_out = set(held_out_images([image.meta["image_id"] for image in whole.images], dev_share, seed))
    parts = {"train": [], "dev": []}
    for image in whole.images:
        parts["dev" if image.meta["image_id"] in held_out else "train"].append(image)
    splits = [
        AnnotatedSplit(split, images, whole.problems if split == "train" else [], _counts(images))
        for split, images in parts.items()
        if images
    ]
    if (folder / "test").is_dir():
        splits.append(_read(folder / "test", "test"))
    return splits, whole.counts


def held_out_images(image_ids: Sequence[int], dev_share: float, seed: int) -> list[int]:
    """The share of the images whose hash of seed and id is lowest: it depends on no order and no generator."""
    ranked = sorted(image_ids, key=lambda number: hashlib.sha256(f"easy_vqa/{seed}/{number}".encode()).digest())
    return ranked[: round(dev_share * len(ranked))]


def colour_and_shape(image: Annotated) -> tuple[str | None, str | None]:
    """What the questions and answers of an image say of its shape; None for what they leave open.

    Raises ValueError, naming the image, where they contradict each other.
    """
    possible = [set(COLOURS), set(SHAPES)]
    for question, answers in zip(image.captions, image.per_caption["answers"], strict=True):
        words = question.lower().rstrip("?").split()
        for values in possible:
            named = {word for word in words if word in COLOURS or word in SHAPES}
            known = {*COLOURS} if values <= {*COLOURS} else {*SHAPES}
            if answers[0] in known:
                values &= {answers[0]}
            elif answers[0] in ("yes", "no"):
                is_there = (answers[0] == "yes") != bool({"not", "no"} & set(words))
                if named & known:
                    values -= (known - named) if is_there else named
            elif named & known:  # "what color is the triangle?" says triangle
                values &= named
    if not all(possible):
        raise ValueError(f"image {image.meta['image_id']}: its questions and answers contradict each other")
    colour, shape = (next(iter(values)) if len(values) == 1 else None for values in possible)
    return colour, shape


def _read(folder: Path, split: str) -> AnnotatedSplit:
    path = folder / "questions.json"
    entries = read_json(path)
    if not isinstance(entries, list):
        raise PrepError(f"{path}: no list, expected easy-VQA's list of [question, answer, image id]")
    images: dict[int, Annotated] = {}
    problems = []
    for number, entry in enumerate(entries):
        if not _is_entry(entry):
            detail = f"{ascii(entry)[:80]}, expected [question, answer, image id]"
            problems.append(Rejection("malformed_row", f"{path.name} entry {number}", detail))
            continue
        question, answer, image_id = entry
        if not is_utf8(question + answer):
            problems.append(Rejection("invalid_utf8", f"{path.name} entry {number}", ascii(entry)[:80]))
            continue
        if image_id not in images:
            identity = f"easy_vqa_{split}/{image_id}"
            meta = {"image_id": image_id, "source": "easy_vqa"}
            names = (f"{split}/images/{image_id}.png",)
            images[image_id] = Annotated(f"{split}_{image_id:05d}", (names,), (identity,), meta)
        images[image_id].add(
            question,
            question_id=number,
            answers=[answer] * NUM_ANSWERS,
            answer_type="yes/no" if answer in ("yes", "no") else "other",
            question_type="yes/no" if answer in ("yes", "no") else "color" if answer in COLOURS else "shape",
        )
    return AnnotatedSplit(split, list(images.values()), problems, {"questions": len(entries), "images": len(images)})


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and all(isinstance(value, str) for value in entry[:2])
        and type(entry[2]) is int
        and entry[2] >= 0
    )


def _counts(images: list[Annotated]) -> dict[str, int]:
    return {"questions": sum(len(image.captions) for image in images), "images": len(images)}
