"""Which frames of a clip the network sees: functions of the clip's length and, in training, of the sample's seed."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pipeline.data.order import mix_words

FRAME_CHOICE_VERSION = 1  # part of a run's fingerprint: raise it with any change that chooses other frames


class FrameChoice(Protocol):
    """From the frames of a clip, at least one, to ``count`` of their numbers in ascending order."""

    def __call__(self, num_frames: int, count: int, seed: int) -> list[int]: ...


def uniform(num_frames: int, count: int, seed: int = 0) -> list[int]:
    """Frame k * num_frames / count, rounded down, for each k below ``count``: of evaluation, as EVLGen's release does.

    A clip of fewer frames than ``count`` gives some of them several times. Nothing is drawn from ``seed``.
    """
    return [number * num_frames // count for number in range(count)]


def head_tail(num_frames: int, count: int, seed: int) -> list[int]:
    """Half of the frames drawn from the first half of a clip, the rest from the second: of training, as EVLGen's
    release does ("headtail"). A single frame is drawn from the whole clip.

    No frame comes twice where its half has enough of them; a half that has fewer gives all, some of them repeated.
    """
    generator = np.random.Generator(np.random.Philox(key=mix_words(seed, "frames")))
    if count == 1:
        return [int(generator.integers(num_frames))]
    middle, first = max(1, num_frames // 2), count // 2
    halves = (range(middle), first), (range(min(middle, num_frames - 1), num_frames), count - first)
    return [number for half, wanted in halves for number in _drawn(half, wanted, generator)]


def _drawn(half: range, count: int, generator: np.random.Generator) -> list[int]:
    if len(half) < count:
        return [half[number] for number in uniform(len(half), count)]
    return sorted(half[number] for number in generator.permutation(len(half))[:count].tolist())
