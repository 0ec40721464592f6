"""Rows of image-caption pairs for a language model that reads the image's tokens before the caption."""

from __future__ import annotations

from dataclasses import dataclass

from model.batch import Row
from model.language.text_form import TextForm
from pipeline.data.shard_reader import RawSample
from pipeline.data.tokenizer import TextTokenizer, clean_caption
from pipeline.data.transforms import UnusableSample
from pipeline.loading.datasets import OtherRows


@dataclass(frozen=True)
class LanguageRows:
    """The caption of a pair, the prompt before it, in the language model's form: at most ``max_text_length`` tokens
    behind the image."""

    tokenizer: TextTokenizer
    form: TextForm
    max_text_length: int
    prompt: str = ""

    def rows(self, sample: RawSample, seed: int, others: OtherRows) -> list[Row]:
        text = clean_caption(sample.text, full_stop=False)
        if not text:
            raise UnusableSample(sample.key, "empty caption")
        text = f"{self.prompt} {text}" if self.prompt else text
        words = self.tokenizer.encode(text, self.max_text_length + 2)[1:-1]
        return [Row(self.form.write(words, self.max_text_length), 0, seed, "pair", sample.key)]

    def placeholder(self, key: str) -> list[Row]:
        return [Row(self.form.write([], self.max_text_length), 0, 0, "placeholder", key)]
