"""Images and clips as annotation files describe them, and the records they become with their files."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.record import Record, Rejection


@dataclass
class Annotated:
    """An image, a pair or a clip, with all its texts; like a Record, with names of files in place of images.

    ``images`` holds for each image, or for the clip, the paths that it may have below a folder, the likeliest first.
    ``identities`` say which picture each is, in whatever corpus it stands: "coco/9", "flickr/1000092795".
    """

    key: str
    images: tuple[tuple[str, ...], ...]
    identities: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    per_caption: dict[str, list[Any]] = field(default_factory=dict)

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
    """The records of a split with the files in ``folders``; what was wrong in the annotation files comes first."""
    yield from annotated.problems
    for image in annotated.images:
        yield _with_files(image, folders, annotated.videos)


def _with_files(image: Annotated, folders: Sequence[Path], is_video: bool) -> Record | Rejection:
    paths = []
    for names in image.images:
        path = next((path for folder in folders for name in names if is_plain_file(path := folder / name)), None)
        if path is None:
            where = ", ".join(map(str, folders))
            reason = "missing_video" if is_video else "missing_image"
            return Rejection(reason, image.key, f"no {names[0]} in {where}", rows=len(image.captions))
        paths.append(path)
    files = {"file": paths[0].name} if len(paths) == 1 else {"files": [path.name for path in paths]}
    contents = tuple(path.read_bytes() for path in paths)
    return Record(
        image.key,
        () if is_video else contents,
        tuple(image.captions),
        {**image.meta, **files, "image_identities": list(image.identities)},
        per_caption=image.per_caption,
        video=contents[0] if is_video else None,
    )


def is_plain_file(path: Path) -> bool:
    """Whether ``path`` is a file, or a link to one: no folder, pipe or device."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def coco_images(image_id: int, split: str) -> tuple[str, ...]:
    """Where the image ``image_id`` of COCO's ``split`` ("train2014") may lie in a folder of images."""
    long, short = f"COCO_{split}_{image_id:012d}.jpg", f"{image_id:012d}.jpg"
    return long, f"{split}/{long}", short, f"{split}/{short}"
