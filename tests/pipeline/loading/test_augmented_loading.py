"""Augmentation in the loader: training samples by their own seeds, the same for every topology; evaluation never."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data_prep.record import Record
from model.batch import Row
from pipeline.data.order import SampleOrder, mix_words, sample_seed
from pipeline.data.shard_reader import Corpus
from pipeline.data.transforms import clip_transform, decode_image
from pipeline.loading.datasets import SampleReader
from pipeline.loading.loader import LoaderOptions
from pipeline.pictures.augmentation import randaugment
from pipeline.pictures.pictures import Pictures
from tests.pipeline.data.test_reader import jpeg, write_split
from tests.pipeline.loading.loader_data import HERE, SIZE, rows_by_sample, same

AUGMENTED = replace(HERE, augmentation="randaugment")


def test_training_images_are_augmented_by_the_seed_of_their_sample(data):
    order = SampleOrder([18, 13], seed=5)
    plain, augmented = (list(data.train(stop=8, options=options)) for options in (HERE, AUGMENTED))
    changed = 0
    for number, batch in enumerate(augmented):
        assert batch.keys == plain[number].keys and torch.equal(batch.plan.text, plain[number].plan.text)
        for slot in range(4):
            corpus, index, epoch = order.at(4 * number + slot)
            image = decode_image(data.corpora[corpus].read(index).images[0])
            seed = mix_words(sample_seed(7, epoch, corpus, index), "image", 0)
            assert torch.equal(batch.images[slot, 0], clip_transform(SIZE)(randaugment(image, seed)))
            changed += not torch.equal(batch.images[slot], plain[number].images[slot])
    assert changed > 20


def test_neither_ranks_nor_workers_nor_a_restart_change_an_augmented_image(data):
    straight = list(data.train(micro_batch=12, stop=4, options=AUGMENTED))
    loaders = [iter(data.train(2, rank, 3, 2, stop=4, options=AUGMENTED)) for rank in range(2)]
    joined = [next(loader) for _ in range(4 * 3) for loader in loaders]
    assert rows_by_sample(joined) == rows_by_sample(straight)
    workers = LoaderOptions(num_workers=2, augmentation="randaugment")
    resumed = list(data.train(micro_batch=12, start=2, stop=4, options=workers))
    assert all(same(a, b) for a, b in zip(straight[2:], resumed, strict=True))


def test_evaluation_is_never_augmented(data):
    pairs = zip(data.evaluate(), data.evaluate(options=AUGMENTED), strict=True)
    assert all(same(plain, augmented) for plain, augmented in pairs)


def test_augmentations_see_the_full_resolution(data):
    """Shifts are in pixels: an image that the decoder had shrunk would move twice as far."""
    fast = replace(HERE, fast_decode=True)
    assert data.train(options=fast)._dataset.reader.pictures.draft_size == 2 * SIZE
    assert data.train(options=replace(fast, augmentation="randaugment"))._dataset.reader.pictures.draft_size is None


class OneRow:
    def rows(self, sample, seed, others):
        return [Row(0, [0, 1], "read")]

    placeholder = None


def test_images_of_a_sample_are_augmented_apart(tmp_path):
    pair = Record("pair", (jpeg(1), jpeg(1)), ("same",), extensions=("jpg", "jpg"))
    corpus = Corpus(write_split(tmp_path / "a" / "train", [pair], corpus="a"))
    reader = SampleReader([corpus], OneRow(), Pictures(clip_transform(SIZE), augment=randaugment))
    out = torch.zeros(reader.image_shape, dtype=torch.uint8)
    apart = 0
    for seed in range(12):
        assert reader.item(0, 0, seed, out).problem is None
        apart += not torch.equal(out[0], out[1])
    assert apart > 6


@pytest.mark.parametrize("name", ["none", "randaugment", "crop_flip"])
def test_options_name_it(name):
    from pipeline.config.options import Config
    from pipeline.loading.open_data import loader_options

    config = Config()
    assert config.data.augmentation == "none"
    config.data.augmentation = name
    assert loader_options(config, pin=False).augmentation == name
