"""Reads Karpathy's splits of COCO and Flickr30k (dataset_coco.json, dataset_flickr30k.json)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import Annotated, AnnotatedSplit, coco_images
from data_prep.annotations.files import BadEntry, entries_of, file_name, list_of, read_object, text, whole_number
from data_prep.record import PrepError, Rejection

SPLIT_OF = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
_EXPECTED = "Karpathy's splits as in dataset_coco.json and dataset_flickr30k.json"


def read_karpathy(path: Path, dataset: str, restval: bool = True) -> list[AnnotatedSplit]:
    """The splits train, dev (``val``) and test of ``dataset`` ("coco", "flickr30k"), an image with all its captions.

    ``restval``, the images of COCO's val2014 in neither dev nor test, are part of train, or else left out. Raises
    PrepError.
    """
    content = read_object(path, _EXPECTED)
    if content.get("dataset") != dataset:
        raise PrepError(
            f"{path}: `dataset` is {content.get('dataset')!r}, expected {dataset!r}; use the verb of that name"
        )
    splits = {name: AnnotatedSplit(name, [], [], {"images": 0, "captions": 0}) for name in ("train", "dev", "test")}
    seen: set[Any] = set()
    for number, entry in enumerate(entries_of(content, "images", path, _EXPECTED)):
        name, sentences = f"{path.name} image {number}", 1
        split = splits["train"]  # where an entry is counted that names no known split
        try:
            sentences = max(1, len(list_of(entry, "sentences")))
            name = file_name(entry, "filename")
            karpathy_split = text(entry, "split")
            if karpathy_split not in SPLIT_OF:
                raise BadEntry("unknown_split", f"split {karpathy_split!r}, expected one of {', '.join(SPLIT_OF)}")
            if karpathy_split == "restval" and not restval:
                continue
            split = splits[SPLIT_OF[karpathy_split]]
            image, problems = _image(entry, name, dataset, seen)
        except BadEntry as error:
            split.problems.append(Rejection(error.reason, name, error.detail, rows=sentences))
            continue
        split.problems += problems
        split.counts["images"] += 1
        split.counts["captions"] += len(image.captions)
        if image.captions:
            split.images.append(image)
        elif not problems:
            split.problems.append(Rejection("empty_caption", name, "no sentence"))
    return [split for split in splits.values() if split.images or split.problems]


def held_out_images(path: Path) -> set[int]:
    """The COCO ids of the images in Karpathy's val and test; raises PrepError."""
    splits = {split.split: split for split in read_karpathy(path, "coco")}
    return {image.meta["image_id"] for name in ("dev", "test") if name in splits for image in splits[name].images}


def _image(entry: dict[str, Any], name: str, dataset: str, seen: set[Any]) -> tuple[Annotated, list[Rejection]]:
    image_id = whole_number(entry, "cocoid" if dataset == "coco" else "imgid")
    for known in (image_id, name):
        if known in seen:
            raise BadEntry("duplicate_id", f"{known} comes again; the earlier image counts")
    seen |= {image_id, name}
    if dataset == "coco":
        folder = file_name(entry, "filepath")
        names, identity = (f"{folder}/{name}", name, *coco_images(image_id, folder)[2:]), f"coco/{image_id}"
    else:
        names, identity = (name, f"flickr30k_images/{name}", f"flickr30k-images/{name}"), f"flickr/{Path(name).stem}"
    meta = {"image_id": image_id, "karpathy_split": entry["split"]}
    image = Annotated(Path(name).stem, (names,), (identity,), meta)
    problems = _add_captions(image, entry, name, seen)
    return image, problems


def _add_captions(image: Annotated, entry: dict[str, Any], name: str, seen: set[Any]) -> list[Rejection]:
    problems = []
    for number, sentence in enumerate(list_of(entry, "sentences")):
        try:
            caption, sentence_id = text(sentence, "raw"), whole_number(sentence, "sentid")
            if ("sentence", str(sentence_id)) in seen:
                raise BadEntry("duplicate_id", f"sentence {sentence_id} comes again; the earlier one counts")
            seen.add(("sentence", str(sentence_id)))
            image.add(caption, sentence_id=sentence_id)
        except BadEntry as error:
            problems.append(Rejection(error.reason, f"{name} sentence {number}", error.detail))
    announced = [number for number in list_of(entry, "sentids") if ("sentence", str(number)) not in seen]
    if announced:
        detail = f"its sentids name {', '.join(map(str, announced[:5]))}, which its sentences lack"
        problems.append(Rejection("captions_missing", name, detail, rows=len(announced)))
    return problems
