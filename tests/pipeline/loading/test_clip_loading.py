"""Batches of clips: frames by the sample's seed, whatever ranks and workers; damage counted; images are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from data_prep.record import Record
from data_prep.shard_writer import SplitWriter
from pipeline.config.options import Config, ConfigError
from pipeline.data.order import SampleOrder, sample_seed
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.transforms import clip_transform
from pipeline.loading.open_data import data_fingerprint, loader_options, open_held_out
from pipeline.pictures.frame_choice import head_tail
from pipeline.pictures.pictures import Pictures
from tests.data_prep.test_clip_shards import clip_record, write_clips
from tests.numbered_clips import clip
from tests.pipeline.data.test_reader import records, write_split
from tests.pipeline.data.test_tokenizer import write_tokenizer
from tests.pipeline.loading.loader_data import HERE, SIZE, Data, same

CLIPS = dataclasses.replace(HERE, frames=4)


@pytest.fixture(scope="module")
def clips(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Twelve clips of two captions each, of 1 to 23 frames."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder / "c" / "train", [clip_record(f"k{n}", clip(1 + 2 * n)) for n in range(12)])
    return dataclasses.replace(data, corpora=[Corpus(folder / "c" / "train")])


def test_ranks_workers_and_restarts_change_nothing(clips: Data) -> None:
    whole = list(clips.train(options=CLIPS, micro_batch=4, stop=5))
    assert whole[0].images.shape == (4, 4, 3, SIZE, SIZE)
    assert all(same(a, b) for a, b in zip(whole[2:], clips.train(options=CLIPS, micro_batch=4, start=2, stop=5)))
    workers = dataclasses.replace(CLIPS, num_workers=2)
    assert all(same(a, b) for a, b in zip(whole, clips.train(options=workers, micro_batch=4, stop=5), strict=True))
    halves = [list(clips.train(world=2, rank=rank, options=CLIPS, micro_batch=2, stop=5)) for rank in (0, 1)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))


def test_frames_are_those_of_the_seed_of_the_sample(clips: Data) -> None:
    corpus, order = clips.corpora[0], SampleOrder([24], seed=5)
    (batch,) = clips.train(options=CLIPS, micro_batch=4, stop=1)
    corpora, indices, epochs = order.at_many(range(4))
    pictures = Pictures(clip_transform(SIZE), num_frames=4, choose=head_tail)
    for images, number, index, epoch in zip(batch.images, corpora, indices, epochs, strict=True):
        expected = torch.empty_like(images)
        pictures.write(corpus.read(int(index)), expected, sample_seed(7, int(epoch), int(number), int(index)))
        assert torch.equal(images, expected)


def test_frames_differ_from_epoch_to_epoch_and_not_in_evaluations(clips: Data) -> None:
    batches = list(clips.train(options=CLIPS, micro_batch=24, stop=2))
    seen = [dict(zip(batch.keys, batch.images)) for batch in batches]
    moved = [not torch.equal(seen[0][f"k{n}"], seen[1][f"k{n}"]) for n in range(12)]
    assert sum(moved) > 6 and not moved[0], "a clip of one frame has no other"
    pictures = Pictures(clip_transform(SIZE), num_frames=4)
    for batch in clips.evaluate(options=CLIPS, batch_size=5):
        for position, images in zip(batch.positions, batch.images, strict=True):
            assert torch.equal(images, pictures.of(clips.corpora[0].read(position)))


def test_damaged_clips_keep_their_slot_and_are_named(data: Data, tmp_path: Path) -> None:
    whole, sound = clip(8), clip(0, sound_seconds=0.5)
    contents = {"good": whole, "cut": whole[:600], "sound": sound, "page": b"<html>", "none": b""}
    with SplitWriter(tmp_path / "d" / "train", "d", "train", videos=True) as writer:
        for key, content in contents.items():
            writer.add(Record(key, (), (f"words of {key}",), {"num_frames": 8}, ("mp4",), video=content))
    damaged = dataclasses.replace(data, corpora=[Corpus(tmp_path / "d" / "train")])
    (batch,) = damaged.evaluate(options=CLIPS, batch_size=5)
    assert batch.problems == [
        ("cut", "broken video"),
        ("sound", "no video stream"),
        ("page", "not a video"),
        ("none", "empty video"),
    ]
    assert batch.images.shape[0] == 5 and batch.images[0].any() and not batch.images[1:].any()


def test_images_and_clips_are_not_mixed(data: Data, clips: Data) -> None:
    for corpora, options in (
        ([*data.corpora, *clips.corpora], CLIPS),
        (data.corpora, CLIPS),
        (clips.corpora, HERE),
    ):
        with pytest.raises(ValueError, match="expected clips in all, or in none"):
            dataclasses.replace(data, corpora=corpora).evaluate(options=options)


def config_of(path: Path, frames: int | None, objective: str = "evlgen") -> Config:
    config = Config()
    config.data.paths, config.data.eval_split, config.data.frames = [str(path)], "train", frames
    config.objective.name = objective
    return config


def test_a_split_of_the_other_kind_is_refused_in_one_line(clips: Data, tmp_path: Path) -> None:
    images = write_split(tmp_path / "images" / "train", records(4))
    of_clips = clips.corpora[0].split_dir.parent
    with pytest.raises(ValueError, match="clips are read with --data.frames N"):
        open_held_out(config_of(of_clips, None))
    with pytest.raises(ValueError, match="images are read with --data.frames null"):
        open_held_out(config_of(images.parent, 4))
    with pytest.raises(
        ConfigError, match="data.frames 4: objective.name flm reads no clips; use --objective.name evlgen"
    ):
        open_held_out(config_of(of_clips, 4, "flm"))
    (opened,) = open_held_out(config_of(of_clips, 4))
    assert opened.is_video and loader_options(config_of(of_clips, 4), pin=False).frames == 4


def test_the_number_of_frames_is_part_of_the_fingerprint(clips: Data, tmp_path: Path) -> None:
    """Of runs of clips only: those of images go on as before."""
    from pipeline.loading.open_data import TrainingData

    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    found = TrainingData(clips.corpora, None, [], tokenizer)
    of = {frames: data_fingerprint(config_of(tmp_path, frames), found) for frames in (None, 4, 8)}
    assert "frames" not in of[None] and of[4]["frames"] != of[8]["frames"]
