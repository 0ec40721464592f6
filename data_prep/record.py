"""The types between a source and a split: records, and rejections with their reasons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class PrepError(ValueError):
    """An error for the user, in one line; the command ends with ``exit_code``."""

    exit_code = 2


class LowYieldError(PrepError):
    """Fewer images could be downloaded than asked for."""

    exit_code = 3


@dataclass(frozen=True)
class Record:
    """One sample: one image or an image pair, its captions (a row each), and its metadata.

    ``extensions`` names the image formats as tar members (jpg, png, webp); the filters fill it in.
    """

    key: str
    images: tuple[bytes, ...]
    captions: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    extensions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rejection:
    """A record, or some of its captions, that was not kept; ``rows`` counts the (image, caption) pairs lost."""

    reason: str
    name: str
    detail: str = ""
    rows: int = 1
