"""Reads Visual Genome's questions and answers as published, without those on held-out images of COCO."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from data_prep.annotations.annotated import Annotated, AnnotatedSplit
from data_prep.annotations.files import BadEntry, list_of, read_json, text, whole_number
from data_prep.annotations.vqav2 import NUM_ANSWERS
from data_prep.record import PrepError, Rejection


def read_visual_genome(question_answers: Path, image_data: Path, held_out: Collection[int]) -> AnnotatedSplit:
    """Visual Genome's questions as rows like VQAv2's, its one answer ten times; half of its images are COCO's.

    ``held_out``: COCO ids of images whose questions are left out and counted as ``held_out_image``. Raises PrepError.
    """
    coco_ids = coco_ids_of(image_data)
    entries = read_json(question_answers)
    if not isinstance(entries, list):
        raise PrepError(f"{question_answers}: no list, expected Visual Genome's question_answers.json")
    images: dict[int, Annotated] = {}
    problems, seen, rows = [], set(), 0
    for number, entry in enumerate(entries):
        name = f"{question_answers.name} entry {number}"
        try:
            questions = list_of(entry, "qas")
        except BadEntry as error:
            problems.append(Rejection(error.reason, name, error.detail))
            continue
        for question in questions:
            rows += 1
            try:
                name = f"Visual Genome question {whole_number(question, 'qa_id')}"
                _add(question, images, coco_ids, held_out, seen)
            except BadEntry as error:
                problems.append(Rejection(error.reason, name, error.detail))
    return AnnotatedSplit("train", list(images.values()), problems, {"questions": rows, "images": len(images)})


def coco_ids_of(path: Path) -> dict[int, int | None]:
    """The COCO id of each of Visual Genome's images, None for those that are not COCO's; raises PrepError."""
    entries = read_json(path)
    try:
        found = {whole_number(entry, "image_id"): entry.get("coco_id") for entry in entries}
    except (BadEntry, TypeError) as error:
        raise PrepError(f"{path}: {error}; expected Visual Genome's image_data.json") from error
    if wrong := next((number for number, coco in found.items() if not isinstance(coco, int | None)), None):
        raise PrepError(f"{path}: `coco_id` of image {wrong} is no number; expected Visual Genome's image_data.json")
    return found


def _add(question, images: dict[int, Annotated], coco_ids: dict, held_out: Collection[int], seen: set[int]) -> None:
    question_id, image_id = whole_number(question, "qa_id"), whole_number(question, "image_id")
    if question_id in seen:
        raise BadEntry("duplicate_id", "it comes again; the earlier one counts")
    seen.add(question_id)
    if image_id not in coco_ids:
        raise BadEntry("missing_image", f"image {image_id} is not in image_data.json")
    coco = coco_ids[image_id]
    if coco in held_out and coco is not None:
        raise BadEntry("held_out_image", f"image {image_id} is image {coco} of COCO, which is held out")
    caption, answers = text(question, "question"), [text(question, "answer")] * NUM_ANSWERS
    if image_id not in images:
        file = f"{image_id}.jpg"
        identity = f"visual_genome/{image_id}" if coco is None else f"coco/{coco}"
        names = (file, f"VG_100K/{file}", f"VG_100K_2/{file}")
        meta = {"image_id": image_id, "source": "vg_qa", "coco_id": coco}
        images[image_id] = Annotated(f"vg_{image_id}", (names,), (identity,), meta)
    images[image_id].add(caption, question_id=question_id, answers=answers)
