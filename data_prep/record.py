"""The types between a source and a split: records, and rejections with their reasons."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


class PrepError(ValueError):
    """An error for the user, in one line; the command ends with ``exit_code``."""

    exit_code = 2


class MissingInput(PrepError):
    """A published file that its user must download first is not there."""


class LowYieldError(PrepError):
    """Fewer images could be downloaded than asked for."""

    exit_code = 3


def in_one_line(content: object) -> str:
    """A text from outside (a library's error, a name in a file) as part of a message: printable, one line, short."""
    return ascii(" ".join(str(content).split())[:300])[1:-1]


@dataclass(frozen=True)
class Record:
    """One sample: one image, an image pair or a clip, its captions (a row each), and its metadata.

    ``meta`` is of the sample. ``per_caption`` holds what is of a row (a label, an id): lists as long as ``captions``,
    which lose an entry with its caption and stand in KEY.json beside ``captions``. ``extensions`` names the image
    formats as tar members (jpg, png, webp; mp4, webm, mkv, avi, mov); the filters fill it in. A clip has its bytes in
    ``video`` and no images.
    """

    key: str
    images: tuple[bytes, ...]
    captions: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    extensions: tuple[str, ...] = ()
    per_caption: dict[str, list[Any]] = field(default_factory=dict)
    video: bytes | None = None

    def __post_init__(self) -> None:
        assert all(len(values) == len(self.captions) for values in self.per_caption.values()), self.key

    def with_captions(self, captions: dict[int, str]) -> Record:
        """The record with these of its captions alone: number in ``self.captions`` -> text."""
        kept = {name: [values[number] for number in captions] for name, values in self.per_caption.items()}
        return replace(self, captions=tuple(captions.values()), per_caption=kept)


@dataclass(frozen=True)
class Rejection:
    """A record, or some of its captions, that was not kept; ``rows`` counts the (image, caption) pairs lost."""

    reason: str
    name: str
    detail: str = ""
    rows: int = 1


@dataclass(frozen=True)
class UrlRow:
    """A row to download, an image with its captions; ``number`` counts the rows of the input from 0."""

    number: int
    url: str
    captions: tuple[str, ...]
    extra: dict[str, Any]
