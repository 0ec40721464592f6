"""Rows of image-caption pairs: the own caption, and for a share of samples another one as a negative."""

from __future__ import annotations

from dataclasses import dataclass

from model.batch import Row
from pipeline.data.order import mix_words
from pipeline.data.shard_reader import RawSample
from pipeline.data.tokenizer import TextTokenizer, clean_caption
from pipeline.data.transforms import UnusableSample
from pipeline.loading.datasets import OtherRows

NEGATIVE_TRIES = 8


@dataclass(frozen=True)
class CaptionRows:
    """Rows of one pair.

    ``negative_share`` of the samples get a row with role ``negative``: the caption of another row of the corpus, unlike
    every caption of the sample. ``full_stop``: captions are normalised to end in "." (the released behaviour).
    """

    tokenizer: TextTokenizer
    max_text_length: int
    negative_share: float = 0.0
    full_stop: bool = False

    def rows(self, sample: RawSample, seed: int, others: OtherRows) -> list[Row]:
        text = clean_caption(sample.text, self.full_stop)
        if not text:
            raise UnusableSample(sample.key, "empty caption")
        rows = [Row(self._encode(text), 0, seed, "pair", sample.key)]
        if mix_words(seed, "has negative") < self.negative_share * 2**64:
            own = [
                text,
                *(clean_caption(c, self.full_stop) for c in sample.meta.get("captions", ()) if isinstance(c, str)),
            ]
            negative = self._negative(seed, own, others)
            if negative is not None:
                rows.append(Row(negative, 0, mix_words(seed, "negative row"), "negative"))
        return rows

    def placeholder(self, key: str) -> list[Row]:
        vocabulary = self.tokenizer.vocabulary
        return [Row([vocabulary.bos_id, vocabulary.eos_id], 0, 0, "placeholder", key)]

    def _negative(self, seed: int, own: set[str], others: OtherRows) -> list[int] | None:
        for attempt in range(NEGATIVE_TRIES):
            found = others.text(mix_words(seed, "negative", attempt))
            text = clean_caption(found, self.full_stop) if found is not None else ""
            if text and text not in own:
                return self._encode(text)
        return None  # all captions drawn are this sample's own

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, self.max_text_length)
