"""Reads nocaps' captions as published (nocaps_val_4500_captions.json), which are in COCO's form."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import Annotated, AnnotatedSplit
from data_prep.annotations.files import BadEntry, entries_of, file_name, read_object, text, whole_number
from data_prep.record import PrepError, Rejection

DOMAINS = ("in-domain", "near-domain", "out-domain")
_EXPECTED = "nocaps' images and captions as in nocaps_val_4500_captions.json"


def read_nocaps(path: Path, split: str = "dev") -> AnnotatedSplit:
    """The images of nocaps with their captions and domains; raises PrepError for a file without captions.

    Only those of its validation split are published, which is ``dev`` here.
    """
    content = read_object(path, _EXPECTED)
    problems: list[Rejection] = []
    images: dict[int, Annotated] = {}
    domains: Counter[str] = Counter()
    entries = entries_of(content, "images", path, _EXPECTED)
    captions = entries_of(content, "annotations", path, _EXPECTED)
    for number, entry in enumerate(entries):
        try:
            image_id, image = _image(entry)
            if image_id in images:
                raise BadEntry("duplicate_id", f"image {image_id} comes again; the earlier one counts")
        except BadEntry as error:
            problems.append(Rejection(error.reason, f"{path.name} image {number}", error.detail))
            continue
        images[image_id] = image
        domains[image.meta["domain"]] += 1
    seen: set[int] = set()
    for number, entry in enumerate(captions):
        try:
            caption_id, image_id = whole_number(entry, "id"), whole_number(entry, "image_id")
            if caption_id in seen:
                raise BadEntry("duplicate_id", f"caption {caption_id} comes again; the earlier one counts")
            seen.add(caption_id)
            if image_id not in images:
                raise BadEntry("missing_image", f"no image {image_id} in {path.name}")
            images[image_id].add(text(entry, "caption"), sentence_id=caption_id)
        except BadEntry as error:
            problems.append(Rejection(error.reason, f"{path.name} caption {number}", error.detail))
    counts = {"images": len(entries), "captions": len(captions), **{name: domains[name] for name in DOMAINS}}
    if not captions:
        raise PrepError(f"{path}: no captions, which are published of the validation images only; expected {_EXPECTED}")
    empty = [image for image in images.values() if not image.captions]
    problems += [Rejection("empty_caption", image.key, "no caption") for image in empty]
    return AnnotatedSplit(split, [image for image in images.values() if image.captions], problems, counts)


def _image(entry: Any) -> tuple[int, Annotated]:
    image_id, file, name = whole_number(entry, "id"), file_name(entry, "file_name"), file_name(entry, "open_images_id")
    domain = text(entry, "domain")
    if domain not in DOMAINS:
        raise BadEntry("unknown_label", f"`domain` is {domain!r}, expected one of {', '.join(DOMAINS)}")
    names = (file, f"{name}.jpg", f"validation/{name}.jpg", f"val/{name}.jpg")
    meta = {"image_id": image_id, "domain": domain, "source": "nocaps"}
    return image_id, Annotated(name, (names,), (f"open_images/{name}",), meta)
