"""Reads Visual Genome's questions and region descriptions as published, without those on held-out images of COCO."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

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
            of_question = name
            try:
                of_question = f"Visual Genome question {whole_number(question, 'qa_id')}"
                _add(question, images, coco_ids, held_out, seen)
            except BadEntry as error:
                problems.append(Rejection(error.reason, of_question, error.detail))
    return AnnotatedSplit("train", list(images.values()), problems, {"questions": rows, "images": len(images)})


def read_regions(descriptions: Path, image_data: Path, held_out: Collection[int]) -> AnnotatedSplit:
    """Visual Genome's region descriptions (region_descriptions.json): each image once, a caption for each region, with
    its id and its box (x, y, width, height in pixels of the image). ``held_out`` as in :func:`read_visual_genome`.

    An image whose regions are all unusable is counted with them. Raises PrepError.
    """
    images_of_coco, urls = coco_ids_of(image_data), _urls_of(image_data)
    entries = read_json(descriptions)
    if not isinstance(entries, list):
        raise PrepError(f"{descriptions}: no list, expected Visual Genome's region_descriptions.json")
    images: dict[int, Annotated] = {}
    problems, seen, rows = [], set(), 0
    for number, entry in enumerate(entries):
        name = f"{descriptions.name} entry {number}"
        try:
            image_id, regions = whole_number(entry, "id" if "id" in entry else "image_id"), list_of(entry, "regions")
            if image_id in images:
                raise BadEntry("duplicate_id", f"image {image_id} comes again; the earlier one counts")
            images[image_id] = image = _image(image_id, images_of_coco, held_out, "vg")
            image.url = urls.get(image_id, "")
        except (BadEntry, TypeError) as error:
            count = max(1, len(entry["regions"])) if _has_regions(entry) else 1
            rows += count
            reason = getattr(error, "reason", "malformed_row")
            problems.append(Rejection(reason, name, str(error)[:200], rows=count))
            continue
        for region in regions:
            rows += 1
            of_region = name
            try:
                of_region = f"Visual Genome region {whole_number(region, 'region_id')}"
                _add_region(region, image, image_id, seen)
            except BadEntry as error:
                problems.append(Rejection(error.reason, of_region, error.detail))
        if not regions:
            problems.append(Rejection("empty_caption", name, "no region"))
    kept = [image for image in images.values() if image.captions]
    return AnnotatedSplit("train", kept, problems, {"images": len(entries), "captions": rows})


def _has_regions(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("regions"), list)


def _add_region(region: Any, image: Annotated, image_id: int, seen: set[int]) -> None:
    region_id = whole_number(region, "region_id")
    if region_id in seen:
        raise BadEntry("duplicate_id", "it comes again; the earlier one counts")
    seen.add(region_id)
    if "image_id" in region and whole_number(region, "image_id") != image_id:
        raise BadEntry("other_image", f"its image is {region['image_id']}, that of its list {image_id}")
    box = [whole_number(region, side) for side in ("x", "y", "width", "height")]
    image.add(text(region, "phrase"), region_id=region_id, box=box)


def _urls_of(path: Path) -> dict[int, str]:
    return {entry["image_id"]: url for entry in read_json(path) if isinstance(url := entry.get("url"), str)}


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
    image = images.get(image_id) or _image(image_id, coco_ids, held_out, "vg_qa")
    caption, answers = text(question, "question"), [text(question, "answer")] * NUM_ANSWERS
    images[image_id] = image
    image.add(caption, question_id=question_id, answers=answers)


def _image(image_id: int, coco_ids: dict[int, int | None], held_out: Collection[int], source: str) -> Annotated:
    if image_id not in coco_ids:
        raise BadEntry("missing_image", f"image {image_id} is not in image_data.json")
    coco = coco_ids[image_id]
    if coco in held_out and coco is not None:
        raise BadEntry("held_out_image", f"image {image_id} is image {coco} of COCO, which is held out")
    file = f"{image_id}.jpg"
    identity = f"visual_genome/{image_id}" if coco is None else f"coco/{coco}"
    names = (file, f"VG_100K/{file}", f"VG_100K_2/{file}")
    meta = {"image_id": image_id, "source": source, "coco_id": coco}
    return Annotated(f"vg_{image_id}", (names,), (identity,), meta)
