"""CIDEr-D, the consensus of a caption with several references (Vedantam, Zitnick, Parikh, CVPR 2015, sections 3 and 5).

Ours, because self-critical training scores thousands of captions a step against fixed document frequencies, and because
pycocoevalcap, to which it is equal, is a package of 104 MB. What everybody prints as "CIDEr" is this CIDEr-D.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # of the penalty for another length
SCALE = 10.0
END = "<eos>"  # the end of a caption, where it counts as a word
PLAIN_WORDS = "lower case, words and numbers only"
FILE_VERSION = 1

Words = Sequence[str]
Gram = tuple[str, ...]


def plain_words(text: str) -> list[str]:
    """Lower case, words and numbers only: what PTB tokenization gives for most captions, without Java."""
    return re.findall(r"\w+", text.lower().replace("'", ""))


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean CIDEr-D of one caption per image in ``plain_words``: to compare with each other, not with published scores.

    Raises ValueError without captions, and for an image without references.
    """
    scores = cider_scores([plain_words(text) for text in captions], [list(map(plain_words, of)) for of in references])
    return sum(scores) / len(scores)


def cider_scores(
    captions: Sequence[Words], references: Sequence[Sequence[Words]], frequencies: DocumentFrequencies | None = None
) -> list[float]:
    """CIDEr-D (0 to 10) of each image's caption, given as words, against the image's references.

    Without ``frequencies`` they are those of ``references``, as pycocoevalcap counts them. Then the scores of a subset
    are not those of the whole set, and those of a single image are 0. Raises ValueError like ``cider_d``.
    """
    if not captions:
        raise ValueError("no captions to score")
    if len(captions) != len(references) or not all(references):
        raise ValueError(f"{len(captions)} captions, {len(references)} images: expected as many, each with references")
    scorer = CiderD(frequencies or DocumentFrequencies.of(references))
    return [
        scorer.score(scorer.vector(caption), [scorer.vector(reference) for reference in of_image])
        for caption, of_image in zip(captions, references, strict=True)
    ]


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many of ``num_images`` images' references an n-gram occurs; those that occur once are left out.

    ``end``: the end of a caption is a word. Without it, self-critical training learns captions that end in "with a".
    """

    num_images: int
    counts: dict[Gram, int]
    end: bool = False
    tokenization: str = PLAIN_WORDS

    @staticmethod
    def of(
        references: Iterable[Sequence[Words]], end: bool = False, tokenization: str = PLAIN_WORDS
    ) -> DocumentFrequencies:
        """Those of references given as words, one sequence of them per image."""
        counts: Counter[Gram] = Counter()
        num_images = 0
        for of_image in references:
            counts.update(set().union(*(_grams(_ended(words, end)) for words in of_image)))
            num_images += 1
        repeated = {gram: count for gram, count in counts.items() if count > 1}
        return DocumentFrequencies(num_images, repeated, end, tokenization)

    def save(self, path: Path) -> None:
        """Write a JSON file that ``load`` reads."""
        counts = {" ".join(gram): count for gram, count in sorted(self.counts.items())}
        head = {"version": FILE_VERSION, "num_images": self.num_images, "end": self.end}
        path.write_text(json.dumps(head | {"tokenization": self.tokenization, "counts": counts}), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> DocumentFrequencies:
        """Raises ValueError, in one line that names the file, for one that ``save`` did not write."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["version"] != FILE_VERSION:
                raise ValueError(f"version {content['version']}, expected {FILE_VERSION}")
            counts = {tuple(gram.split(" ")): int(count) for gram, count in content["counts"].items()}
            num_images, end = int(content["num_images"]), bool(content["end"])
            if num_images < 1 or max(counts.values(), default=1) > num_images:
                raise ValueError(f"an n-gram in more than its {num_images} images")
            return DocumentFrequencies(num_images, counts, end, str(content["tokenization"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no file of document frequencies ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Vector:
    """A caption's tf-idf weights by n-gram, their norms for n = 1, 2, 3, 4, and its length."""

    weights: tuple[dict[Gram, float], ...]
    norms: tuple[float, ...]
    length: int


class CiderD:
    """Scores captions by fixed document frequencies; scoring leaves nothing behind."""

    def __init__(self, frequencies: DocumentFrequencies) -> None:
        self.frequencies = frequencies
        self._log_images = math.log(frequencies.num_images)

    def vector(self, words: Words, ended: bool = True) -> Vector:
        """What ``score`` compares. ``ended`` False: the caption was cut off, so it lacks the word for its end."""
        grams = _grams(_ended(words, self.frequencies.end and ended))
        weights: tuple[dict[Gram, float], ...] = tuple({} for _ in range(LONGEST))
        for gram, count in grams.items():
            idf = self._log_images - math.log(self.frequencies.counts.get(gram, 1))
            weights[len(gram) - 1][gram] = count * idf
        norms = tuple(math.sqrt(sum(value**2 for value in of_n.values())) for of_n in weights)
        # NOTE paper: lengths in words; pycocoevalcap counts two-word n-grams, so do we.
        return Vector(weights, norms, sum(count for gram, count in grams.items() if len(gram) == 2))

    def score(self, caption: Vector, references: Sequence[Vector]) -> float:
        """CIDEr-D (0 to 10) of one caption: the mean over its references."""
        return SCALE * sum(_similarity(caption, reference) for reference in references) / len(references)


def _similarity(caption: Vector, reference: Vector) -> float:
    """Mean over n of the cosine of tf-idf vectors, the caption's clipped, times the penalty for another length."""
    total = 0.0
    for n in range(LONGEST):
        ours, theirs = caption.weights[n], reference.weights[n]
        norms = caption.norms[n] * reference.norms[n]
        if norms:
            total += (
                sum(min(value, theirs[gram]) * theirs[gram] for gram, value in ours.items() if gram in theirs) / norms
            )
    return math.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2)) * total / LONGEST


def _grams(words: Words) -> Counter[Gram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def _ended(words: Words, end: bool) -> Words:
    return [*words, END] if end else words
