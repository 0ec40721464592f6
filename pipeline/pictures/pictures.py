"""What the network sees of a sample: its images, or frames of its clip, decoded and resized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from data_prep.images import ImageProblem
from data_prep.video.decoding import read_frames
from pipeline.config.options import Config
from pipeline.data.order import mix_words
from pipeline.data.shard_reader import RawSample
from pipeline.data.transforms import (
    DEFAULT_MAX_PIXELS,
    ClipTransform,
    UnusableSample,
    clip_transform,
    decode_image,
    draft_size,
    unusable,
)
from pipeline.pictures.augmentation import Augment
from pipeline.pictures.frame_choice import FrameChoice, uniform


@dataclass(frozen=True)
class Pictures:
    """How samples become pixels; of a clip ``num_frames`` frames that ``choose`` names (None: samples hold images).

    ``augment`` changes images before the resize, the frames of a clip all in the same way. ``draft_size`` is that of
    ``decode_image``.
    """

    transform: ClipTransform
    max_pixels: int = DEFAULT_MAX_PIXELS
    draft_size: int | None = None
    augment: Augment | None = None
    num_frames: int | None = None
    choose: FrameChoice = uniform

    def write(self, sample: RawSample, out: Tensor, seed: int = 0, key: str | None = None) -> None:
        """The pictures of a sample into ``out``, uint8 [I, 3, S, S], what is random about them drawn from ``seed``.

        Raises UnusableSample, with ``key`` (None: the sample's), for what does not decode.
        """
        key = sample.key if key is None else key
        if sample.video is not None:
            for slot, frame in enumerate(self.frames(sample.video, key, seed, sample.num_frames)):
                self.transform(self._augmented(frame, seed, 0), out[slot])
            return
        for slot, data in enumerate(sample.images):
            image = decode_image(data, self.max_pixels, key, self.draft_size)
            self.transform(self._augmented(image, seed, slot), out[slot])

    def of(self, sample: RawSample) -> Tensor:
        """The pictures of a sample as nothing random would have them, uint8 [I, 3, S, S]; raises UnusableSample."""
        number = len(sample.images) if sample.video is None else self.num_frames
        out = torch.empty((number or 1, 3, self.transform.size, self.transform.size), dtype=torch.uint8)
        self.write(sample, out)
        return out

    def frames(self, data: bytes, key: str, seed: int = 0, counted: int | None = None) -> Sequence[Image.Image]:
        """The chosen frames of a clip, of which ``counted`` says how many it has where that is known, mode RGB.

        Raises UnusableSample with one of the reasons "empty video", "not a video", "no video stream", "broken video",
        "truncated video", "too many frames", "too many parts", "too many pixels", "extreme aspect ratio".
        """
        if self.num_frames is None:
            raise UnusableSample(key, "not an image")
        count = self.num_frames
        try:
            return read_frames(data, lambda found: self.choose(found, count, seed), counted, self.max_pixels)
        except ImageProblem as error:
            raise unusable(key, error) from error

    def _augmented(self, image: Image.Image, seed: int, slot: int) -> Image.Image:
        return image if self.augment is None else self.augment(image, mix_words(seed, "image", slot))


def pictures_of(config: Config, exact: bool = False) -> Pictures:
    """How an evaluation with this ``config`` sees samples; ``exact`` resizes as Pillow does, whatever the run does."""
    size, data = config.model.vision.image_size, config.data
    fast = data.fast_decode and not exact
    return Pictures(clip_transform(size, fast), data.max_pixels, draft_size(size, fast), num_frames=data.frames)
