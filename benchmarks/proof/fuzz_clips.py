"""Clips for `fuzz.py`: every container that is read, in preparing and in training."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.proof.fuzz_target import Files, Target
from data_prep.images import ImageProblem
from data_prep.video.decoding import ClipLimits, check_clip, read_frames
from pipeline.pictures.frame_choice import uniform
from tests.numbered_clips import CODECS, clip, turned

LIMITS = ClipLimits(max_pixels=64_000, max_frames=60)
SEEN = 4  # frames


def clips() -> Target:
    """Each is checked as in preparing; one that is kept is decoded as in training, with and without its count."""
    made = [*(clip(6, container) for container in CODECS), clip(6, sound_seconds=0.2), turned(clip(4))]

    def sample(generator: random.Random) -> Files:
        return {"clip": generator.choice(made)}

    def use(folder: Path, files: Files) -> None:
        [data] = files.values()
        counted = check_clip(data, LIMITS).num_frames
        for known in (counted, None):
            frames = read_frames(data, lambda found: uniform(found, SEEN), known, LIMITS.max_pixels)
            assert len(frames) == SEEN and all(frame.mode == "RGB" for frame in frames)

    return Target("clips", sample, use, (ImageProblem,))
