"""Reads GQA's questions as published (train_balanced_questions.json and the like)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import Annotated, AnnotatedSplit
from data_prep.annotations.files import BadEntry, file_name, is_utf8, read_object, text
from data_prep.annotations.vqav2 import NUM_ANSWERS
from data_prep.record import PrepError, Rejection

SPLIT_OF = {"train": "train", "val": "dev", "testdev": "test_dev", "test": "test", "challenge": "challenge"}
TYPES = ("structural", "semantic", "detailed")
_EXPECTED = "GQA's questions by their ids, as in testdev_balanced_questions.json"


def read_gqa(path: Path, split: str | None = None, coco_ids: Mapping[int, int | None] | None = None) -> AnnotatedSplit:
    """A split of GQA with all questions of an image together, its one answer ten times, as VQA's are.

    The file's name says which ``split`` it is, where none is given. Questions of test splits have no answers.
    ``coco_ids`` of Visual Genome's images tell which of them are COCO's.

    Raises:
        PrepError: no such file, one of another kind, or a name that says nothing.
    """
    name = path.name.partition("_")[0]
    if split is None and name not in SPLIT_OF:
        raise PrepError(f"{path}: its name begins with none of {', '.join(SPLIT_OF)}; name the split by --split")
    content = read_object(path, _EXPECTED)
    if not all(isinstance(entry, dict) for entry in content.values()) or not content:
        raise PrepError(f"{path}: holds no object for each question, expected {_EXPECTED}")
    images: dict[str, Annotated] = {}
    problems, answers = [], 0
    has_answers = any("answer" in entry for entry in content.values())
    for question_id, entry in content.items():
        try:
            if not is_utf8(question_id):
                raise BadEntry("invalid_utf8", f"its id is {ascii(question_id)[:80]}")
            image_id, question = file_name(entry, "imageId"), text(entry, "question")
            of_question = _answer(entry) if has_answers else {}
        except BadEntry as error:
            problems.append(Rejection(error.reason, f"question {ascii(question_id)[1:-1]}", error.detail))
            continue
        answers += has_answers
        if image_id not in images:
            images[image_id] = _image(image_id, coco_ids or {})
        images[image_id].add(question, question_id=question_id, **of_question)
    counts = {"questions": len(content), "images": len(images)} | ({"answers": answers} if has_answers else {})
    return AnnotatedSplit(split or SPLIT_OF[name], list(images.values()), problems, counts)


def _answer(entry: dict[str, Any]) -> dict[str, Any]:
    types = entry.get("types")
    if not isinstance(types, dict):
        raise BadEntry("malformed_row", "has no object `types`")
    groups = entry.get("groups")
    return {
        "answers": [text(entry, "answer")] * NUM_ANSWERS,
        "full_answer": text(entry, "fullAnswer"),
        **{name: text(types, name) for name in TYPES},
        "group": text(groups, "global") if isinstance(groups, dict) and groups.get("global") is not None else "",
    }


def _image(image_id: str, coco_ids: Mapping[int, int | None]) -> Annotated:
    """Images are Visual Genome's, by its numbers, and further ones ("n161313")."""
    file, number = f"{image_id}.jpg", int(image_id) if image_id.isascii() and image_id.isdigit() else None
    identity = f"gqa/{image_id}" if number is None else f"visual_genome/{number}"
    if number is not None and (coco := coco_ids.get(number)) is not None:
        identity = f"coco/{coco}"
    names = (file, f"images/{file}", f"allImages/images/{file}", f"VG_100K/{file}", f"VG_100K_2/{file}")
    return Annotated(f"gqa_{image_id}", (names,), (identity,), {"image_id": image_id, "source": "gqa"})
