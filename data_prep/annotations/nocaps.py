"""Reads nocaps' captions as published (nocaps_val_4500_captions.json), which are in COCO's form."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import Annotated, AnnotatedSplit
from data_prep.annotations.coco_form import read_coco_form
from data_prep.annotations.files import BadEntry, entries_of, file_name, read_object, text, whole_number
from data_prep.record import PrepError

DOMAINS = ("in-domain", "near-domain", "out-domain")
_EXPECTED = "nocaps' images and captions as in nocaps_val_4500_captions.json"


def read_nocaps(path: Path, split: str = "dev") -> AnnotatedSplit:
    """The images of nocaps with their captions and domains; raises PrepError for a file without captions.

    Only those of its validation split are published, which is ``dev`` here.
    """
    content = read_object(path, _EXPECTED)
    if not entries_of(content, "annotations", path, _EXPECTED):
        raise PrepError(f"{path}: no captions, which are published of the validation images only; expected {_EXPECTED}")
    domains: Counter[str] = Counter()
    seen: set[int] = set()

    def image_of(entry: Any) -> tuple[int, Annotated]:
        image_id, image = _image(entry)
        domains[image.meta["domain"]] += image_id not in seen
        seen.add(image_id)
        return image_id, image

    found = read_coco_form(path, content, _EXPECTED, split, image_of)
    found.counts |= {name: domains[name] for name in DOMAINS}
    return found


def _image(entry: Any) -> tuple[int, Annotated]:
    image_id, file, name = whole_number(entry, "id"), file_name(entry, "file_name"), file_name(entry, "open_images_id")
    domain = text(entry, "domain")
    if domain not in DOMAINS:
        raise BadEntry("unknown_label", f"`domain` is {domain!r}, expected one of {', '.join(DOMAINS)}")
    names = (file, f"{name}.jpg", f"validation/{name}.jpg", f"val/{name}.jpg")
    meta = {"image_id": image_id, "domain": domain, "source": "nocaps"}
    return image_id, Annotated(name, (names,), (f"open_images/{name}",), meta)
