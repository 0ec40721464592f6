"""How positions become decoded, tokenised samples: the stream of training and the choice of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pipeline.data.order import SampleOrder, mix_words, sample_seed
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import TextTokenizer
from pipeline.data.transforms import ClipTransform, UnusableSample, decode_image
from pipeline.loading.collate import Item, clean_caption

Started = Callable[[int, int], None]  # is told corpus and row of the sample that is read next
_NEGATIVE_TRIES = 8


@dataclass(frozen=True)
class SampleReader:
    """Reads, decodes, resizes and tokenises one sample; everything random comes from the seed it is given."""

    corpora: Sequence[Corpus]
    tokenizer: TextTokenizer
    transform: ClipTransform
    max_text_length: int
    negative_share: float
    full_stop: bool
    max_pixels: int
    draft_size: int | None

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        """[I, 3, S, S] of one sample; raises ValueError for corpora that do not agree on I."""
        num_images = sorted({corpus.num_images for corpus in self.corpora})
        if len(num_images) > 1:
            raise ValueError(f"corpora of {num_images} images per sample: expected the same number in all")
        return num_images[0], 3, self.transform.size, self.transform.size

    def item(
        self,
        corpus: int,
        index: int,
        seed: int,
        out: Tensor,
        image_index: int | None = None,
        near: range | None = None,
    ) -> Item:
        """Row ``index`` of a corpus; its images, or those of row ``image_index``, are written into ``out``.

        ``out`` is uint8 [I, 3, S, S]; an unusable sample leaves it black and gives a placeholder. Where ``near`` names
        rows that are read together, a negative caption is one of theirs.
        """
        try:
            sample = self.corpora[corpus].read(index)
            encoded = sample.images if image_index is None else self.corpora[corpus].read(image_index).images
            text = clean_caption(sample.text, self.full_stop)
            if not text:
                raise UnusableSample(sample.key, "empty caption")
            for slot, data in enumerate(encoded):
                self.transform(decode_image(data, self.max_pixels, sample.key, self.draft_size), out[slot])
        except UnusableSample as error:
            out.zero_()
            vocabulary = self.tokenizer.vocabulary
            return Item(error.key, seed, [vocabulary.bos_id, vocabulary.eos_id], None, error.reason)
        own = [text, *(clean_caption(c, self.full_stop) for c in sample.meta.get("captions", ()) if isinstance(c, str))]
        return Item(sample.key, seed, self._encode(text), self._negative(corpus, index, seed, own, near))

    def _negative(self, corpus: int, index: int, seed: int, own: list[str], near: range | None) -> list[int] | None:
        """For a share of samples the caption of another row of the corpus, unlike every caption of this sample."""
        rows = near if near is not None and len(near) > 1 else range(len(self.corpora[corpus]))
        if mix_words(seed, "has negative") >= self.negative_share * 2**64:
            return None
        for attempt in range(_NEGATIVE_TRIES):
            other = rows[mix_words(seed, "negative", attempt) % len(rows)]
            if other == index:
                continue
            try:
                text = clean_caption(self.corpora[corpus].read_text(other), self.full_stop)
            except UnusableSample:
                continue  # counted when its own turn comes
            if text and text not in own:
                return self._encode(text)
        return None  # all captions drawn are this sample's own

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, self.max_text_length)


@dataclass(frozen=True)
class TrainDataset:
    """Positions of the training stream to items; within a batch they are read in the order of the shards."""

    reader: SampleReader
    order: SampleOrder
    seed: int

    def items(self, positions: Sequence[int], out: Tensor, started: Started = lambda corpus, index: None) -> list[Item]:
        """The samples at ``positions``; their images go to ``out``, uint8 [B, I, 3, S, S]."""
        corpora, indices, epochs = self.order.at_many(positions)
        items: list[Item | None] = [None] * len(positions)
        for slot in np.lexsort((indices, corpora)).tolist():
            corpus, index, epoch = int(corpora[slot]), int(indices[slot]), int(epochs[slot])
            started(corpus, index)
            seed, near = sample_seed(self.seed, epoch, corpus, index), self.order.read_together(corpus, index)
            items[slot] = self.reader.item(corpus, index, seed, out[slot], near=near)
        return items


@dataclass(frozen=True)
class EvalDataset:
    """Positions of a fixed, evenly spaced choice of ``max_samples`` rows (null: all) to items, seeded as in epoch 0.

    ``shuffle_images`` pairs each text with the image half the corpus's choice away: nobody keeps the own image, and the
    other captions of an image, which stand beside it, do not either.
    """

    reader: SampleReader
    seed: int
    max_samples: int | None = None
    shuffle_images: bool = False
    _chosen: list[np.ndarray] = field(init=False)  # per corpus, row numbers

    def __post_init__(self) -> None:
        ends = np.cumsum([len(corpus) for corpus in self.reader.corpora])
        total = int(ends[-1])
        count = total if self.max_samples is None else min(self.max_samples, total)
        if count < 1:
            raise ValueError(f"{count} samples to evaluate: expected at least 1")
        rows = np.arange(count) * total // count
        split = np.split(rows, np.searchsorted(rows, ends[:-1]))
        chosen = [part - (end - len(corpus)) for part, end, corpus in zip(split, ends, self.reader.corpora)]
        if self.shuffle_images and any(len(part) == 1 for part in chosen):
            raise ValueError("one sample of a corpus to evaluate: shuffled images need at least 2 of each")
        object.__setattr__(self, "_chosen", chosen)

    def __len__(self) -> int:
        return sum(len(part) for part in self._chosen)

    def items(self, positions: Sequence[int], out: Tensor, started: Started = lambda corpus, index: None) -> list[Item]:
        """The samples at ``positions``; their images go to ``out``, uint8 [B, I, 3, S, S]."""
        return [self._item(position, pixels, started) for position, pixels in zip(positions, out)]

    def _item(self, position: int, out: Tensor, started: Started) -> Item:
        corpus = 0
        while position >= len(self._chosen[corpus]):
            position -= len(self._chosen[corpus])
            corpus += 1
        part = self._chosen[corpus]
        index = int(part[position])
        started(corpus, index)
        image_index = int(part[(position + len(part) // 2) % len(part)]) if self.shuffle_images else None
        return self.reader.item(corpus, index, sample_seed(self.seed, 0, corpus, index), out, image_index)
