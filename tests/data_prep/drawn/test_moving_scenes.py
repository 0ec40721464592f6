"""Drawn clips: equal bytes for equal seeds, things that move as the caption says, ways that only order tells apart."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.checks.verify import Limits, verify_split
from data_prep.drawn.drawing import draw_things
from data_prep.drawn.moving_scenes import WAYS, MovingOptions, draw_moving_scene, share_of_way, write_moving
from data_prep.record import PrepError
from data_prep.video.decoding import read_frames
from pipeline.data.shard_reader import Corpus


def options(train: int = 12, dev: int = 6, test: int = 0, **more: object) -> MovingOptions:
    return MovingOptions({"train": train, "dev": dev, "test": test}, **more)


def digests(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*.*")}


def test_equal_seeds_give_equal_bytes_and_held_out_clips_stay(tmp_path: Path) -> None:
    write_moving(tmp_path / "a" / "moving", options())
    write_moving(tmp_path / "b" / "moving", options())
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    write_moving(tmp_path / "c" / "moving", options(train=20))
    tars = [(tmp_path / one / "moving" / "dev" / "00000.tar").read_bytes() for one in "ac"]
    assert tars[0] == tars[1]
    write_moving(tmp_path / "d" / "moving", options(seed=1))
    assert (tmp_path / "d" / "moving" / "dev" / "00000.tar").read_bytes() != tars[0]
    assert verify_split(tmp_path / "a" / "moving" / "train", Limits(), 1).problems == []


def test_the_caption_is_true_of_the_frames(tmp_path: Path) -> None:
    """The middle of what is not background moves along the axis, and in the direction, that the caption names."""
    write_moving(tmp_path / "moving", options(train=40))
    corpus = Corpus(tmp_path / "moving" / "train")
    seen = set()
    for index in range(len(corpus)):
        sample = corpus.read(index)
        colour, shape, way = (sample.meta[name] for name in ("main_colour", "main_shape", "way"))
        article = "an" if colour[0] in "aeiou" else "a"
        assert sample.text == f"{article} {colour} {shape} moves {way}" and sample.num_frames == 16
        middles = []
        for frame in read_frames(sample.video, lambda n: [0, n - 1]):
            pixels = np.asarray(frame).astype(int)
            rows, columns = np.nonzero(np.abs(pixels - pixels[0, 0]).sum(2) > 60)
            middles.append((columns.mean() / 64, rows.mean() / 64))
        moved = np.subtract(middles[1], middles[0])
        expected = 0.56 * np.array(WAYS[way])
        assert np.abs(moved - expected).max() < 0.06, (sample.text, moved)
        seen.add(way)
    assert seen == set(WAYS)


def test_opposite_ways_are_the_same_pictures_in_another_order() -> None:
    """Four frames at equal distances: as a set they are equal, so that a network blind to order can't tell them."""
    scene = dataclasses.replace(draw_moving_scene(random.Random(0)), way="left")
    shares = [share_of_way(number * 16 // 4, 16) for number in range(4)]
    left, right = (
        [np.asarray(draw_things([one.thing_at(share)], one.grey, 64)) for share in shares]
        for one in (scene, dataclasses.replace(scene, way="right"))
    )
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(left, right[::-1]))
    assert not np.array_equal(left[0], right[0])


def test_the_verb_and_its_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "moving"
    words = ["moving", "--output", str(output), "--train", "3", "--dev", "0", "--test", "2", "--image-size", "32"]
    assert main([*words, "--num-frames", "5", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"{output / 'test'}: 2 rows" in printed and f"{output / 'train'}: 3 rows" in printed
    assert Corpus(output / "train").read(0).num_frames == 5
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    for odd in (dict(image_size=33), dict(num_frames=3), dict(train=0, dev=0)):
        with pytest.raises(PrepError, match="expected"):
            options(**odd)
