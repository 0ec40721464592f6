"""CIDEr-D, the consensus of a caption with several references (Vedantam, Zitnick, Parikh, CVPR 2015, section 5).

Ours, because the reference implementation is a package of 104 MB with Java programs inside; tests compare with numbers
of that package. What differs is the tokenisation: lower case, words and numbers only, where the package runs Stanford's
tokenizer. So scores are comparable with each other, not with published ones.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty for another length
SCALE = 10.0

Grams = Counter[tuple[str, ...]]


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean CIDEr-D of one caption per image; how telling an n-gram is, is counted over the images' references."""
    if not captions:
        raise ValueError("no captions to score")
    found = [_grams(_words(caption)) for caption in captions]
    wanted = [[_grams(_words(reference)) for reference in of_image] for of_image in references]
    images_with = Counter(gram for of_image in wanted for gram in set().union(*of_image))
    scores = [
        sum(_similarity(caption, reference, images_with, len(captions)) for reference in of_image) / len(of_image)
        for caption, of_image in zip(found, wanted, strict=True)
    ]
    return SCALE * sum(scores) / len(scores)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower().replace("'", ""))


def _grams(words: list[str]) -> Grams:
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def _similarity(caption: Grams, reference: Grams, images_with: Counter, num_images: int) -> float:
    """Mean over n of the clipped cosine of tf-idf vectors, times the length penalty."""
    # NOTE paper: lengths in words; the reference implementation counts two-word n-grams, so do we.
    lengths = [sum(count for gram, count in grams.items() if len(gram) == 2) for grams in (caption, reference)]
    penalty = math.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * SIGMA**2))
    total = 0.0
    for n in range(1, LONGEST + 1):
        ours, theirs = (_weighted(grams, n, images_with, num_images) for grams in (caption, reference))
        norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in (ours, theirs)]
        if all(norms):
            total += sum(min(value, theirs[gram]) * theirs[gram] for gram, value in ours.items() if gram in theirs) / (
                norms[0] * norms[1]
            )
    return penalty * total / LONGEST


def _weighted(grams: Grams, n: int, images_with: Counter, num_images: int) -> dict[tuple[str, ...], float]:
    log_images = math.log(num_images)
    return {
        gram: count * (log_images - math.log(max(images_with[gram], 1)))
        for gram, count in grams.items()
        if len(gram) == n
    }
