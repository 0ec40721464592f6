"""How positions become decoded, tokenised samples: the stream of training and the choice of an evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from model.batch import Planner, Row
from pipeline.data.order import SampleOrder, mix_words, sample_seed
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.transforms import UnusableSample
from pipeline.loading.collate import Item
from pipeline.pictures.pictures import Pictures
from pipeline.stored_features.files import StoredFeatures
from pipeline.stored_features.opening import FeatureSource

EvalImages = Literal["own", "shuffled", "hidden"]
ALL_TEXTS = sys.maxsize
Started = Callable[[int, int], None]  # is told corpus and row of the sample that is read next


@dataclass(frozen=True)
class OtherRows:
    """The texts of a corpus that a sample may be contrasted with: all of it, or the rows that are read together."""

    corpus: Corpus
    own: int  # row of the sample itself
    numbers: range

    def text(self, choice: int) -> str | None:
        """The text of one of them, ``choice`` modulo their number; None for the own row and for what cannot be read."""
        number = self.numbers[choice % len(self.numbers)]
        if number == self.own:
            return None
        try:
            return self.corpus.read_text(number)
        except UnusableSample:
            return None  # counted when its own turn comes


class RowMaker(Protocol):
    """What a task makes of one sample; runs in the loader's processes."""

    def rows(self, sample: RawSample, seed: int, others: OtherRows) -> list[Row]:
        """Rows of a sample, images counted from 0; everything random comes from ``seed``. Raises UnusableSample."""

    def placeholder(self, key: str) -> list[Row]:
        """Rows without targets that keep the slot of an unusable sample."""


@dataclass(frozen=True)
class Preparation:
    """How samples of a task become a batch: rows of a sample, plan of a batch, images of ``image_size`` pixels."""

    maker: RowMaker
    planner: Planner
    image_size: int
    features: FeatureSource | None = None  # read instead of images


@dataclass(frozen=True)
class SampleReader:
    """Reads one sample, has its rows made and its ``pictures`` decoded."""

    corpora: Sequence[Corpus]
    maker: RowMaker
    pictures: Pictures
    features: Sequence[StoredFeatures] | None = None  # of each corpus, read instead of images

    @property
    def image_shape(self) -> tuple[int, ...]:
        """[I, 3, S, S] of one sample, I its images or the frames of its clip, or [I, P, 2W] of stored features; raises
        ValueError for corpora that do not agree on I, or of which some hold clips."""
        num_images = sorted({corpus.num_images for corpus in self.corpora})
        if len(num_images) > 1:
            raise ValueError(f"corpora of {num_images} images per sample: expected the same number in all")
        if {corpus.is_video for corpus in self.corpora} != {self.pictures.num_frames is not None}:
            raise ValueError("corpora of clips and of images, or frames of images: expected clips in all, or in none")
        if self.features is not None:
            return self.features[0].identity.bytes_shape
        size = self.pictures.transform.size
        return self.pictures.num_frames or num_images[0], 3, size, size

    @property
    def stored(self) -> torch.dtype | None:
        """The dtype of stored features, None where images are read."""
        return None if self.features is None else self.features[0].identity.torch_dtype

    def read_ahead(self, corpus: int, rows: Sequence[int]) -> None:
        """Let a corpus that is far away begin to fetch ``rows``, whose images are read next."""
        if self.features is None:
            self.corpora[corpus].read_ahead(rows)

    def item(
        self,
        corpus: int,
        index: int,
        seed: int,
        out: Tensor,
        image_index: int | None = None,
        near: range | None = None,
        num_texts: int = 1,
        hide_images: bool = False,
    ) -> Item:
        """Row ``index`` of a corpus; its images, or those of row ``image_index``, are written into ``out``.

        ``out`` is uint8 of ``image_shape``; an unusable sample leaves it black and gives a placeholder, and
        ``hide_images`` leaves it black. Where ``near`` names rows that are read together, other texts are theirs. With
        ``num_texts`` above 1 the item has up to so many of the texts of the row's images.
        """
        read = self.corpora[corpus]
        numbers = near if near is not None and len(near) > 1 else range(len(read))
        try:
            if self.features is None:
                sample = read.read(index)
                shown = sample if image_index is None else read.read(image_index)
            else:
                sample = shown = read.read_without_images(index)
            others = OtherRows(read, index, numbers)
            if num_texts == 1:
                rows = self.maker.rows(sample, seed, others)
            else:
                rows = self._rows_of_texts(sample, seed, others, num_texts)
            if hide_images:
                out.zero_()
            elif self.features is not None:
                self.features[corpus].read(index if image_index is None else image_index, out)
            else:
                self.pictures.write(shown, out, seed, sample.key)
        except UnusableSample as error:
            out.zero_()
            return Item(error.key, self.maker.placeholder(error.key), error.reason)
        return Item(sample.key, rows)

    def _rows_of_texts(self, sample: RawSample, seed: int, others: OtherRows, num_texts: int) -> list[Row]:
        """Rows of some of the texts of a sample, drawn by ``seed``; negatives are those of the first of them.

        Texts that are unusable by themselves are passed over; raises UnusableSample where none is left.
        """
        generator = np.random.Generator(np.random.Philox(key=mix_words(seed, "texts")))
        rows: list[Row] = []
        problem = UnusableSample(sample.key, "missing caption")
        for number in generator.permutation(sample.num_texts)[:num_texts].tolist():
            try:
                found = self.maker.rows(sample.with_text(number), mix_words(seed, "text", number), others)
            except UnusableSample as error:
                problem = error
                continue
            rows += [row for row in found if not rows or row.role != "negative"]
        if not rows:
            raise problem
        return rows


@dataclass(frozen=True)
class TrainDataset:
    """Positions of the training stream to items; within a batch they are read in the order of the shards.

    ``rows``, with ``num_texts`` above 1, are the first rows of the images of each corpus, int64 [samples]: the order
    counts images then, and an item has up to so many of the texts of one.
    """

    reader: SampleReader
    order: SampleOrder
    seed: int
    num_texts: int = 1
    rows: Sequence[np.ndarray] | None = None

    def items(self, positions: Sequence[int], out: Tensor, started: Started = lambda corpus, index: None) -> list[Item]:
        """The samples at ``positions``; their images go to ``out``, uint8 [B, I, 3, S, S]."""
        corpora, indices, epochs = self.order.at_many(positions)
        items: list[Item | None] = [None] * len(positions)
        in_turn = np.lexsort((indices, corpora)).tolist()
        for corpus in np.unique(corpora).tolist():
            chosen = [int(indices[slot]) for slot in in_turn if corpora[slot] == corpus]
            rows = chosen if self.rows is None else self.rows[corpus][chosen].tolist()
            self.reader.read_ahead(corpus, rows)
        for slot in in_turn:
            corpus, index, epoch = int(corpora[slot]), int(indices[slot]), int(epochs[slot])
            seed, near = sample_seed(self.seed, epoch, corpus, index), self.order.read_together(corpus, index)
            if self.rows is not None:
                near = None if near is None else self._rows_of_images(corpus, near)
                index = int(self.rows[corpus][index])
            started(corpus, index)
            items[slot] = self.reader.item(corpus, index, seed, out[slot], near=near, num_texts=self.num_texts)
        return items

    def _rows_of_images(self, corpus: int, images: range) -> range:
        """All rows of a range of images, of which there is at least one."""
        starts = [*self.rows[corpus][images.start : images.stop + 1].tolist(), len(self.reader.corpora[corpus])]
        return range(starts[0], starts[len(images)])


@dataclass(frozen=True)
class EvalDataset:
    """Positions of a fixed, evenly spaced choice of ``max_samples`` rows (null: all) to items, seeded as in epoch 0.

    Where ``images`` is "shuffled", each text is paired with the image half the corpus's choice away: nobody keeps the
    own image, and the other captions of an image, which stand beside it, do not either. "hidden" images are black.
    With ``texts_per_image`` the choice is of images, not of texts, and an item has up to so many texts of one: with 1
    the first.
    """

    reader: SampleReader
    seed: int
    max_samples: int | None = None
    images: EvalImages = "own"
    texts_per_image: int | None = None
    _chosen: list[np.ndarray] = field(init=False)  # per corpus, row numbers

    def __post_init__(self) -> None:
        corpora = self.reader.corpora
        rows_of = [corpus.first_rows() if self.texts_per_image else np.arange(len(corpus)) for corpus in corpora]
        ends = np.cumsum([len(rows) for rows in rows_of])
        total = int(ends[-1])
        count = total if self.max_samples is None else min(self.max_samples, total)
        if count < 1:
            raise ValueError(f"{count} samples to evaluate: expected at least 1")
        numbers = np.arange(count) * total // count
        split = np.split(numbers, np.searchsorted(numbers, ends[:-1]))
        chosen = [rows[part - (end - len(rows))] for part, end, rows in zip(split, ends, rows_of)]
        if self.images == "shuffled" and any(len(part) == 1 for part in chosen):
            raise ValueError("one sample of a corpus to evaluate: shuffled images need at least 2 of each")
        object.__setattr__(self, "_chosen", chosen)

    def __len__(self) -> int:
        return sum(len(part) for part in self._chosen)

    def rows(self) -> list[tuple[int, int]]:
        """(corpus, row) at each position."""
        return [(corpus, row) for corpus, part in enumerate(self._chosen) for row in part.tolist()]

    def items(self, positions: Sequence[int], out: Tensor, started: Started = lambda corpus, index: None) -> list[Item]:
        """The samples at ``positions``; their images go to ``out``, uint8 [B, I, 3, S, S]."""
        places = [self._place(position) for position in positions]
        for corpus in {corpus for corpus, _ in places}:
            chosen = [int(self._chosen[corpus][within]) for other, within in places if other == corpus]
            self.reader.read_ahead(corpus, list(dict.fromkeys(chosen)))
        return [self._item(*place, pixels, started) for place, pixels in zip(places, out)]

    def _place(self, position: int) -> tuple[int, int]:
        """Corpus, and the place among those chosen of it."""
        corpus = 0
        while position >= len(self._chosen[corpus]):
            position -= len(self._chosen[corpus])
            corpus += 1
        return corpus, position

    def _item(self, corpus: int, position: int, out: Tensor, started: Started) -> Item:
        part = self._chosen[corpus]
        index = int(part[position])
        started(corpus, index)
        image_index = int(part[(position + len(part) // 2) % len(part)]) if self.images == "shuffled" else None
        seed, hide_images = sample_seed(self.seed, 0, corpus, index), self.images == "hidden"
        num_texts = self.texts_per_image or 1
        return self.reader.item(corpus, index, seed, out, image_index, num_texts=num_texts, hide_images=hide_images)
