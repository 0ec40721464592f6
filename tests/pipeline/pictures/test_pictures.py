"""Pixels of a clip: those of its frames, resized as images are, changed alike, read as preparing counted them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from data_prep.video.decoding import read_frames
from pipeline.data.shard_reader import RawSample
from pipeline.data.transforms import UnusableSample, clip_transform
from pipeline.pictures.augmentation import augment_named
from pipeline.pictures.frame_choice import head_tail
from pipeline.pictures.pictures import Pictures
from tests.numbered_clips import HEIGHT, WIDTH, clip, picture
from tests.pipeline.data.test_reader import jpeg

SIZE = 32
PICTURES = Pictures(clip_transform(SIZE), num_frames=4)


def sample(video: bytes, **meta: object) -> RawSample:
    return RawSample("k", [], "words", meta, video=video)


def test_frames_are_resized_as_images_are() -> None:
    data = clip(12)
    found = PICTURES.of(sample(data))
    assert found.shape == (4, 3, SIZE, SIZE) and found.dtype == torch.uint8
    for pixels, frame in zip(found, read_frames(data, lambda n: [0, 3, 6, 9]), strict=True):
        assert torch.equal(pixels, clip_transform(SIZE)(frame))


def test_the_seed_chooses_the_frames_in_training() -> None:
    training = dataclasses.replace(PICTURES, choose=head_tail)
    data, out = clip(40), torch.empty((4, 3, SIZE, SIZE), dtype=torch.uint8)
    for seed in (1, 2, 3):
        training.write(sample(data, num_frames=40), out, seed)
        expected = read_frames(data, lambda n, seed=seed: head_tail(n, 4, seed))
        assert torch.equal(out, torch.stack([clip_transform(SIZE)(frame) for frame in expected]))


def test_a_count_that_is_wrong_or_odd_changes_nothing() -> None:
    data = clip(6)
    expected = PICTURES.of(sample(data))
    for count in (6, 60, 10**12, -1, 0, True, "6", None, 6.0):
        assert torch.equal(PICTURES.of(sample(data, num_frames=count)), expected), count


@pytest.mark.parametrize("name", ["randaugment", "crop_flip"])
def test_all_frames_are_changed_alike(name: str) -> None:
    """A clip that stands still stays one: whatever a frame becomes, the others become too."""
    still = clip(1, first=0b10110)
    training = dataclasses.replace(PICTURES, augment=augment_named(name, SIZE))
    out, plain = torch.empty((4, 3, SIZE, SIZE), dtype=torch.uint8), PICTURES.of(sample(still))
    changed = 0
    for seed in range(8):
        training.write(sample(still), out, seed)
        assert all(torch.equal(out[0], frame) for frame in out[1:])
        changed += not torch.equal(out, plain)
    assert changed >= 4


def test_unusable_clips_have_their_reasons() -> None:
    reasons = {
        b"": "empty video",
        b"<html>": "not a video",
        clip(0, sound_seconds=0.5): "no video stream",
        clip(8, "webm")[:200]: "broken video",
    }
    for data, reason in reasons.items():
        with pytest.raises(UnusableSample) as refused:
            PICTURES.of(sample(data))
        assert (refused.value.key, refused.value.reason) == ("k", reason)
    with pytest.raises(UnusableSample, match="too many pixels"):
        dataclasses.replace(PICTURES, max_pixels=WIDTH * HEIGHT - 1).of(sample(clip(2)))
    assert picture(3).shape == (HEIGHT, WIDTH, 3)


def test_images_are_as_before() -> None:
    pictures = Pictures(clip_transform(SIZE))
    found = pictures.of(RawSample("k", [jpeg(1), jpeg(2)], "words", {}))
    assert found.shape == (2, 3, SIZE, SIZE) and not torch.equal(found[0], found[1])
    with pytest.raises(UnusableSample, match="not an image"):
        pictures.of(sample(clip(2)))
