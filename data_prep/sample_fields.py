"""What a sample of a split holds, as fields of its index and in words: so many images, or a clip."""

from __future__ import annotations

CLIP_FIELDS = ("video", "text", "meta")


def fields_of(num_images: int) -> tuple[str, ...]:
    """Fields of a sample of ``num_images`` images: image, image1, image2, ..., text, meta."""
    return ("image", *(f"image{number}" for number in range(1, num_images)), "text", "meta")


def contents(num_images: int | None, is_video: bool) -> str:
    """For an error line: what a sample holds."""
    return "a clip" if is_video else f"{num_images} image(s)"


def advice(is_video: bool, wants_video: bool) -> str:
    """How data of this kind is read, where the other kind is wanted; an end of an error line."""
    if is_video == wants_video:
        return ""
    return "; clips are read with --data.frames N" if is_video else "; images are read with --data.frames null"
