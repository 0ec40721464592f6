"""Reads captions in COCO's form, a list of images and a list of annotations, as COCO itself publishes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import Annotated, AnnotatedSplit, coco_images
from data_prep.annotations.files import BadEntry, entries_of, file_name, read_object, text, whole_number
from data_prep.record import PrepError, Rejection

SPLIT_OF = {"train2014": "train", "val2014": "dev", "train2017": "train", "val2017": "dev"}
_EXPECTED = "COCO's images and captions as in captions_train2014.json"


def read_coco_captions(path: Path, held_out: Collection[int] = ()) -> tuple[str, AnnotatedSplit]:
    """(COCO's name of the split, the split) of ``captions_{train,val}{2014,2017}.json``; raises PrepError.

    The name is that in the file's name, or else in those of its images. Images whose ids are ``held_out`` are left out
    and counted.
    """
    content = read_object(path, _EXPECTED)
    entries = entries_of(content, "images", path, _EXPECTED)
    first = str(entries[0].get("file_name") if entries and isinstance(entries[0], dict) else "")
    named = next((name for where in (path.stem, first) for name in re.findall(r"(?:train|val)20\d\d", where)), "")
    if named not in SPLIT_OF:
        raise PrepError(f"{path}: neither its name nor its images' say one of {', '.join(SPLIT_OF)}; name it like that")

    def image_of(entry: Any) -> tuple[int, Annotated]:
        image_id, file = whole_number(entry, "id"), file_name(entry, "file_name")
        if image_id in held_out:
            raise BadEntry("held_out_image", f"image {image_id} of COCO is held out")
        names = (file, f"{named}/{file}", *coco_images(image_id, named))
        urls = [entry[field] for field in ("coco_url", "flickr_url") if isinstance(entry.get(field), str)]
        image = Annotated(Path(file).stem, (names,), (f"coco/{image_id}",), {"image_id": image_id})
        image.url = next(iter(urls), "")
        return image_id, image

    return named, read_coco_form(path, content, _EXPECTED, SPLIT_OF[named], image_of)


def read_coco_form(
    path: Path,
    content: dict[str, Any],
    expected: str,
    split: str,
    image_of: Callable[[Any], tuple[int, Annotated]],
) -> AnnotatedSplit:
    """The images of a file in this form with their captions; ``image_of`` reads one entry of its images, or raises
    BadEntry. Raises PrepError."""
    problems: list[Rejection] = []
    images: dict[int, Annotated] = {}
    refused: dict[int, Rejection] = {}  # image id -> why the image can't be used, its captions with it
    entries = entries_of(content, "images", path, expected)
    captions = entries_of(content, "annotations", path, expected)
    for number, entry in enumerate(entries):
        try:
            image_id, image = image_of(entry)
            if image_id in images:
                raise BadEntry("duplicate_id", f"image {image_id} comes again; the earlier one counts")
        except BadEntry as error:
            problem = Rejection(error.reason, f"{path.name} image {number}", error.detail)
            if error.reason == "held_out_image":
                refused[entry["id"]] = problem
            else:
                problems.append(problem)
            continue
        images[image_id] = image
    seen: set[int] = set()
    for number, entry in enumerate(captions):
        try:
            caption_id, image_id = whole_number(entry, "id"), whole_number(entry, "image_id")
            if caption_id in seen:
                raise BadEntry("duplicate_id", f"caption {caption_id} comes again; the earlier one counts")
            seen.add(caption_id)
            if image_id in refused:
                raise BadEntry(refused[image_id].reason, refused[image_id].detail)
            if image_id not in images:
                raise BadEntry("missing_image", f"no image {image_id} in {path.name}")
            images[image_id].add(text(entry, "caption"), sentence_id=caption_id)
        except BadEntry as error:
            problems.append(Rejection(error.reason, f"{path.name} caption {number}", error.detail))
    empty = [image for image in images.values() if not image.captions]
    problems += [Rejection("empty_caption", image.key, "no caption") for image in empty]
    counts = {"images": len(entries), "captions": len(captions)}
    return AnnotatedSplit(split, [image for image in images.values() if image.captions], problems, counts)
