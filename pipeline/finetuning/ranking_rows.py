"""Rows of retrieval: the own caption of an image, then wrong ones drawn from the corpus."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.batch import Row
from model.plans.hard_negatives import resemblance
from pipeline.data.order import mix_words
from pipeline.data.shard_reader import RawSample
from pipeline.data.tokenizer import TextTokenizer, clean_caption
from pipeline.data.transforms import UnusableSample
from pipeline.loading.datasets import OtherRows

TRIES = 4  # draws for each caption that is wanted


@dataclass(frozen=True)
class RankingRows:
    """The caption of a sample, and ``num_negatives`` others of the corpus on the same image.

    They are drawn by the sample's seed; with a ``pool``, they are those of so many drawn ones that resemble the own
    caption most (weighted Jaccard index of their tokens). Captions of the sample are no negatives, and none is one
    twice; where draws run out there are fewer. ``released`` as the public release: captions end in ".", and any draw
    is a negative.
    """

    tokenizer: TextTokenizer
    max_text_length: int
    num_negatives: int
    pool: int = 0
    released: bool = False

    def rows(self, sample: RawSample, seed: int, others: OtherRows) -> list[Row]:
        text = clean_caption(sample.text, self.released)
        if not text:
            raise UnusableSample(sample.key, "empty caption")
        captions = sample.meta.get("captions", ())
        own = {text, *(clean_caption(one, self.released) for one in captions if isinstance(one, str))}
        wanted = self.pool or self.num_negatives
        drawn = self._drawn(wanted, set() if self.released else own, seed, others) if self.num_negatives else []
        ids = [self.tokenizer.encode(one, self.max_text_length) for one in [text, *drawn]]
        if self.pool:
            likeness = resemblance([one[1:-1] for one in ids], [0])[0, 1:]
            ids = [ids[0], *(ids[1 + number] for number in np.argsort(-likeness, kind="stable")[: self.num_negatives])]
        return [Row(one, 0, seed, "read", sample.key) for one in ids]

    def placeholder(self, key: str) -> list[Row]:
        vocabulary = self.tokenizer.vocabulary
        return [Row([vocabulary.bos_id, vocabulary.eos_id], 0, 0, "placeholder", key)]

    def _drawn(self, wanted: int, passed_over: set[str], seed: int, others: OtherRows) -> list[str]:
        drawn: list[str] = []
        for attempt in range(TRIES * wanted):
            if len(drawn) == wanted:
                break
            found = others.text(mix_words(seed, "ranked", attempt))
            text = clean_caption(found, self.released) if found is not None else ""
            if text and text not in passed_over:
                drawn.append(text)
                if not self.released:
                    passed_over.add(text)
        return drawn


@dataclass(frozen=True)
class ImageRows:
    """Rows for batches of which the images alone are wanted."""

    def rows(self, sample: RawSample, seed: int, others: OtherRows) -> list[Row]:
        return self.placeholder(sample.key)

    def placeholder(self, key: str) -> list[Row]:
        return [Row([], 0, 0, "placeholder", key)]
