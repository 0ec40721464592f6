"""Images and clips as annotation files describe them, and the records they become with their files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.image_places import Places, open_places
from data_prep.record import Record, Rejection

MAX_FILE_BYTES = 1 << 30  # of an image or clip; the filters' own limits are lower


@dataclass
class Annotated:
    """An image, a pair or a clip, with all its texts; like a Record, with names of files in place of images.

    ``images`` holds for each image, or for the clip, the paths that it may have below a folder, the likeliest first.
    ``identities`` say which picture each is, in whatever corpus it stands: "coco/9", "flickr/1000092795". ``url`` is
    where the annotation file says that the one image can be downloaded.
    """

    key: str
    images: tuple[tuple[str, ...], ...]
    identities: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    per_caption: dict[str, list[Any]] = field(default_factory=dict)
    url: str = ""

    def add(self, caption: str, **of_caption: Any) -> None:
        """Add a text and what is of it alone; each text of an image must bring the same names."""
        self.captions.append(caption)
        for name, value in of_caption.items():
            self.per_caption.setdefault(name, []).append(value)


@dataclass
class AnnotatedSplit:
    """A split as its annotation files describe it.

    ``counts`` are of the files, what can't be used included: those that the set's authors published. With ``videos``
    each of its ``images`` is a clip.
    """

    split: str
    images: list[Annotated]
    problems: list[Rejection]
    counts: dict[str, int]
    videos: bool = False

    @property
    def rows(self) -> int:
        return sum(len(image.captions) for image in self.images)


def records(annotated: AnnotatedSplit, folders: Sequence[Path]) -> Iterator[Record | Rejection]:
    """The records of a split with the files in ``folders``, folders or archives; what was wrong in the annotation
    files comes first."""
    yield from annotated.problems
    with open_places(folders) as places:
        where = ", ".join(map(str, folders))
        for image in annotated.images:
            yield _with_files(image, places, where, annotated.videos)


def _with_files(image: Annotated, places: Places, where: str, is_video: bool) -> Record | Rejection:
    kind, rows = "video" if is_video else "image", len(image.captions)
    found, contents = [], []
    for names in image.images:
        file = places.find(names)
        if file is None:
            return Rejection(f"missing_{kind}", image.key, f"no {names[0]} in {where}", rows=rows)
        if file.size > MAX_FILE_BYTES:
            return Rejection(f"{kind}_bytes_too_large", image.key, f"{file.name}: {file.size} bytes", rows=rows)
        try:
            contents.append(file.read(MAX_FILE_BYTES))
        except OSError as error:
            return Rejection(f"undecodable_{kind}", image.key, str(error)[:200], rows=rows)
        found.append(file.name)
    files = {"file": found[0]} if len(found) == 1 else {"files": found}
    return Record(
        image.key,
        () if is_video else tuple(contents),
        tuple(image.captions),
        {**image.meta, **files, "image_identities": list(image.identities)},
        per_caption=image.per_caption,
        video=contents[0] if is_video else None,
    )


def coco_images(image_id: int, split: str) -> tuple[str, ...]:
    """Where the image ``image_id`` of COCO's ``split`` ("train2014") may lie in a folder of images."""
    long, short = f"COCO_{split}_{image_id:012d}.jpg", f"{image_id:012d}.jpg"
    return long, f"{split}/{long}", short, f"{split}/{short}"
