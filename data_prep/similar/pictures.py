"""Small pictures of images, their 64-bit perceptual hashes, and the finer comparison of two such pictures.

A picture is what an image looks like at 32x32 grey levels and 8x8 pairs of colour differences. Its hash is the signs
of the 64 lowest frequencies of the grey levels, the mean left out: a perceptual hash by the discrete cosine transform
as in Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), section 3.2.1, but with signs
in place of comparisons with the median, so that a bit depends on its own frequency alone. All sums are of whole numbers
below 2**53, so they are exact in float64 and equal on every machine; what decodes an image may differ between versions
of libjpeg by a grey level, which is why versions are stored with hashes.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.images import image_problems, open_image, upright_rgb

VERSION = 2  # of pictures and hashes; others are made anew
SIDE, COLOUR_SIDE = 32, 8
GREY_BYTES, COLOUR_BYTES = SIDE**2, 2 * COLOUR_SIDE**2
PICTURE_BYTES = GREY_BYTES + COLOUR_BYTES
HASH_BITS = 64
MIN_CORRELATION = 0.45  # of the slopes of two near-duplicates' grey levels
MAX_COLOUR_DIFFERENCE = 12.0  # levels, mean over the picture
MIN_COLOUR = 3.0  # levels: below it a picture is grey, and its colours are not compared
_DRAFT = 4 * SIDE  # a JPEG is decoded at a scale that leaves at least so many pixels a side
_COSINE_SCALE = 2**11
_LOWEST = 11  # along each side, enough for the 64 pairs of least sum
_PAIRS = sorted(itertools.product(range(_LOWEST), repeat=2), key=lambda pair: (sum(pair), pair[0]))[1 : HASH_BITS + 1]
_NUMBERS = [first * _LOWEST + second for first, second in _PAIRS]
_MIN_AMPLITUDE, _MIN_FREQUENCIES = 0.25, 32  # so many of the 64 frequencies must be stronger, in grey levels
_UNITS = 40  # windows are given in 40ths of a side
_LEVELS, _TWO_TONE_SHARE = 16, 0.95
_AT_A_TIME = 4096  # pictures, for the memory that sums need

Window = tuple[int, int]  # begin and end along a side, in 40ths of it; beyond 0 and 40 the border's pixels go on


class Look(NamedTuple):
    """How a picture is looked at: windows along its height and width, perhaps mirrored first."""

    rows: Window = (0, _UNITS)
    columns: Window = (0, _UNITS)
    mirrored: bool = False


PLAIN = Look()
_CUT = 2  # of 40: 5 %
INNER = Look((_CUT, _UNITS - _CUT), (_CUT, _UNITS - _CUT))  # all four sides cut off


def looks(crops: bool, mirrored: bool) -> list[Look]:
    """The ways in which a copy may differ: with ``crops``, up to 5 % cut off, at each of 9 places from either of the
    two, or on all four sides from the copy; each of them mirrored too if asked.

    A look beyond the border, at what the other copy lacks, guesses: on all four sides too much for a hash. There the
    larger of the two is to be looked at, by INNER.
    """
    found = [PLAIN]
    if crops:
        for cut in (_CUT, -_CUT):  # the other copy is the cropped one where it is below 0
            begins = (0, cut // 2, cut)
            places = [(begin, _UNITS - cut + begin) for begin in begins]
            found += [Look(rows, columns) for rows, columns in itertools.product(places, repeat=2)]
        found.append(INNER)
    return [look._replace(mirrored=turn) for turn in ((False, True) if mirrored else (False,)) for look in found]


def picture_of(content: bytes, max_pixels: int) -> np.ndarray:
    """The picture, uint8 [1152], of an encoded image, upright; raises ImageProblem for what cannot be decoded."""
    with image_problems():
        image = open_image(content, max_pixels)
        image.draft("RGB", (_DRAFT, _DRAFT))
        image = upright_rgb(image)
        grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        small = image.resize((SIDE, SIDE), Image.Resampling.BOX).convert("YCbCr")
        colour = small.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX)
    blue, red = np.asarray(colour)[..., 1], np.asarray(colour)[..., 2]
    return np.concatenate([np.asarray(grey).ravel(), blue.ravel(), red.ravel()])


def hashes_of(pictures: np.ndarray, look: Look = PLAIN) -> np.ndarray:
    """Hashes, uint64 [N], of pictures uint8 [N, 1152] under ``look``."""
    found = np.empty(len(pictures), np.uint64)
    for start in range(0, len(pictures), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        bits = _frequencies(pictures[part], look) > 0
        found[part] = np.ascontiguousarray(np.packbits(bits, axis=1)).view(">u8")[:, 0]
    return found


def tells_enough(pictures: np.ndarray) -> np.ndarray:
    """Whether each of pictures uint8 [N, 1152] has a hash, bool [N]: flat, two-tone and evenly graded images have none,
    as hashes of unlike ones are equal."""
    found = np.empty(len(pictures), bool)
    least = _MIN_AMPLITUDE * (_COSINE_SCALE * _UNITS * SIDE / 2) ** 2
    for start in range(0, len(pictures), _AT_A_TIME):
        part = pictures[start : start + _AT_A_TIME]
        strong = np.count_nonzero(np.abs(_frequencies(part, PLAIN)) >= least, axis=1)
        levels = np.sort(part[:, :GREY_BYTES] // (256 // _LEVELS), axis=1)
        counts = np.stack([np.count_nonzero(levels == level, axis=1) for level in range(_LEVELS)], axis=1)
        two_tone = np.sort(counts, axis=1)[:, -2:].sum(axis=1) > _TWO_TONE_SHARE * GREY_BYTES
        found[start : start + _AT_A_TIME] = (strong >= _MIN_FREQUENCIES) & ~two_tone
    return found


def correlations(one: np.ndarray, other: np.ndarray, look: Look = PLAIN) -> np.ndarray:
    """Correlation, float64 [N], of the slopes of grey levels (differences of neighbours along both sides) of pictures
    ``one`` under ``look`` with ``other``, both uint8 [N, 1152]; 0 where a picture is flat.

    Of unlike photographs with near hashes it hardly exceeds 0.4, where that of grey levels reaches 0.9.
    """
    first, second = _slopes(_looked_at(one, look)), _slopes(_grey(other))
    lengths = np.sqrt((first * first).sum(axis=1) * (second * second).sum(axis=1))
    return np.where(lengths > 0, (first * second).sum(axis=1) / np.maximum(lengths, 1), 0.0)


def same_colours(one: np.ndarray, other: np.ndarray, look: Look = PLAIN) -> np.ndarray:
    """Whether colours are alike, bool [N], of pictures uint8 [N, 1152]; a grey picture is like any."""
    colours = one[:, GREY_BYTES:].reshape(-1, 2, COLOUR_SIDE, COLOUR_SIDE).astype(np.int16) - 128
    colours = colours[..., ::-1] if look.mirrored else colours
    others = other[:, GREY_BYTES:].reshape(-1, 2, COLOUR_SIDE, COLOUR_SIDE).astype(np.int16) - 128
    mean = lambda levels: np.abs(levels).mean(axis=(1, 2, 3))  # noqa: E731
    grey = (mean(colours) < MIN_COLOUR) | (mean(others) < MIN_COLOUR)
    return grey | (mean(colours - others) <= MAX_COLOUR_DIFFERENCE)


def _looked_at(pictures: np.ndarray, look: Look) -> np.ndarray:
    """Grey levels under ``look`` as whole numbers, float64 [N, 32, 32], about 40 * 40 times as large."""
    grey = _grey(pictures)
    grey = grey[..., ::-1] if look.mirrored else grey
    return _resampling(look.rows) @ grey @ _resampling(look.columns).T


def _grey(pictures: np.ndarray) -> np.ndarray:
    return pictures[:, :GREY_BYTES].reshape(-1, SIDE, SIDE).astype(np.float64)


def _resampling(window: Window) -> np.ndarray:
    """Weights [32, 32], whole numbers: how much of each pixel of a side lies in each pixel of the window's picture."""
    begin, end = window
    weights = np.zeros((SIDE, SIDE))
    for pixel in range(SIDE):
        low, high = begin * SIDE + pixel * (end - begin), begin * SIDE + (pixel + 1) * (end - begin)  # in 40ths
        for place in range(low // _UNITS, -(-high // _UNITS)):
            inside = min(high, (place + 1) * _UNITS) - max(low, place * _UNITS)
            weights[pixel, min(max(place, 0), SIDE - 1)] += inside
    return weights


def _frequencies(pictures: np.ndarray, look: Look) -> np.ndarray:
    """The 64 lowest frequencies of the grey levels, whole numbers, float64 [N, 64]. DCT-II, Ahmed et al. (1974)."""
    place = np.arange(SIDE)
    cosines = np.round(_COSINE_SCALE * np.cos(np.pi * np.outer(place[:_LOWEST], 2 * place + 1) / (2 * SIDE)))
    found = cosines @ _looked_at(pictures, look) @ cosines.T
    return found.reshape(len(pictures), -1)[:, _NUMBERS]


def _slopes(grey: np.ndarray) -> np.ndarray:
    along, down = np.diff(grey, axis=2), np.diff(grey, axis=1)
    return np.concatenate([along.reshape(len(grey), -1), down.reshape(len(grey), -1)], axis=1)
