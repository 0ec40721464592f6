"""What may be expected of a download before it begins: the share that succeeds, disk and hours."""

from __future__ import annotations

from typing import NamedTuple


class Yield(NamedTuple):
    """What share of a corpus's images somebody could download, when, and where that is written."""

    share: float
    when: str
    source: str


# Reported publicly; links rot on, so what comes now is less. The latest stands first.
REPORTED_YIELDS: dict[str, tuple[Yield, ...]] = {
    "cc3m": (
        Yield(0.70, "2024-01", "github.com/rom1504/img2dataset/issues/391"),
        Yield(2_905_954 / 3_318_333, "2021-12", "huggingface.co/datasets/pixparse/cc3m-wds, training rows"),
        Yield(13_443 / 15_840, "2023-12", "huggingface.co/datasets/pixparse/cc3m-wds, validation rows"),
    ),
    "cc12m": (Yield(7_740_121 / 12_423_374, "2025-10", "github.com/google-research-datasets/conceptual-12m/issues/9"),),
    "sbu": (Yield(0.86, "no date", "img2dataset's page of the corpus, dataset_examples/SBUcaptions.md"),),
}
# NOTE measured on 500 photographs of Flickr8k shrunk to 192 x 192 as --image-size does it (JPEG of quality 92): 14,522
# bytes each; 0.42 bytes a pixel at 160, 0.49 at 112. Larger images have fewer bytes a pixel, so this errs upwards.
BYTES_PER_PIXEL = 0.39
_ASPECT = 4 / 3  # longer over shorter side of a usual photograph
_TAR_BYTES = 3 * 512 + 3 * 256 + 600  # headers, padding and texts of a sample with three members


def expected_bytes(samples: float, image_size: int) -> float:
    """Disk that shards of so many images need whose shorter side is ``image_size`` pixels."""
    return samples * (BYTES_PER_PIXEL * _ASPECT * image_size**2 + _TAR_BYTES)


def expected_time(images: int, per_second: float) -> str:
    """How long so many images take at a rate, as one reads it: 2.4 h, 36 min, 5 s."""
    seconds = images / per_second
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


def in_words(count: float) -> str:
    """A number of bytes as one reads it: 1.5 TB, 12 GB, 300 MB (powers of 1000)."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.{1 if count < 10 * size else 0}f} {unit}"
    return f"{count / 1e3:.0f} kB"
