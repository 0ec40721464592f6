"""Makes the synthetic corpus of clips: a thing that moves, and a caption that says which way.

A thing moves for three quarters of its clip and then rests. Four frames at equal distances are therefore the same
pictures for a way and for its opposite, in another order: only who knows the order of frames can tell which it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.drawn.drawing import draw_things
from data_prep.drawn.scenes import COLOURS, SHAPES, Thing
from data_prep.drawn.synth import SPLITS, check_split_sizes
from data_prep.filters import check_record
from data_prep.manifest import Manifest
from data_prep.parallel import ordered_map
from data_prep.prepare import progress, provenance
from data_prep.record import PrepError, Record
from data_prep.shard_writer import SplitWriter, refuse_existing
from data_prep.video.decoding import ClipLimits
from data_prep.video.encoding import encode_clip

WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FRAMES_PER_SECOND = 8
REACH = 0.28  # from the middle to where a way begins and ends, a share of the side
MOVING_SHARE = 0.75


@dataclass(frozen=True)
class MovingOptions:
    """``counts`` clips per split, of ``num_frames`` frames each."""

    counts: dict[str, int]
    seed: int = 0
    image_size: int = 64
    num_frames: int = 16
    samples_per_shard: int = 2000
    workers: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 32 <= self.image_size <= 1024 or self.image_size % 2:
            raise PrepError(f"--image-size {self.image_size}: expected an even number of 32 to 1024 pixels")
        if not 4 <= self.num_frames <= 1000:
            raise PrepError(f"--num-frames {self.num_frames}: expected 4 to 1000")
        check_split_sizes(self.counts)


@dataclass(frozen=True)
class MovingScene:
    """One thing and its way; ``across`` is where it stays on the other axis, a share of the side."""

    shape: str
    colour: str
    way: str
    across: float
    radius: float
    grey: int  # of the background, 0..255

    @property
    def caption(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} moves {self.way}"

    def thing_at(self, share: float) -> Thing:
        """The thing after a ``share`` of its way."""
        right, down = WAYS[self.way]
        along = 0.5 + REACH * (2 * share - 1) * (right + down)
        x, y = (along, self.across) if right else (self.across, along)
        return Thing(self.shape, self.colour, "medium", x, y, self.radius)


def draw_moving_scene(rng: random.Random) -> MovingScene:
    """A random scene; its factors are independent of each other."""
    look = rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(tuple(WAYS))
    return MovingScene(
        *look, round(rng.uniform(0.35, 0.65), 3), round(rng.uniform(0.14, 0.18), 3), rng.randrange(185, 236)
    )


def share_of_way(frame: int, num_frames: int) -> float:
    """How much of its way a thing has gone in a frame: all of it after three quarters of the clip."""
    return min(1.0, frame / (MOVING_SHARE * num_frames))


def clip_of(scene: MovingScene, image_size: int, num_frames: int) -> bytes:
    """The scene as an MP4."""
    shares = [share_of_way(frame, num_frames) for frame in range(num_frames)]
    frames = [draw_things([scene.thing_at(share)], scene.grey, image_size) for share in shares]
    return encode_clip(frames, FRAMES_PER_SECOND)


def write_moving(output: Path, options: MovingOptions) -> list[Manifest]:
    """Write the corpus ``output``; returns the manifests in the order of SPLITS."""
    for split, count in options.counts.items():
        if count:
            refuse_existing(output / split, options.overwrite)
    seen: set[tuple] = set()
    manifests = []
    for split in SPLITS:
        scenes = _distinct(random.Random(f"moving/{options.seed}/{split}"), seen)
        items = [(f"{split}_{number:07d}", next(scenes)) for number in range(options.counts.get(split, 0))]
        if items:
            manifests.append(_write(output, split, items, options))
    return manifests


def _distinct(rng: random.Random, seen: set[tuple]) -> Iterator[MovingScene]:
    while True:
        scene = draw_moving_scene(rng)
        if astuple(scene) not in seen:
            seen.add(astuple(scene))
            yield scene


def _write(output: Path, split: str, items: list[tuple[str, MovingScene]], options: MovingOptions) -> Manifest:
    arguments = {
        name: value for name, value in asdict(options).items() if name in ("counts", "seed", "image_size", "num_frames")
    }
    writer = SplitWriter(
        output / split,
        output.resolve().name,
        split,
        samples_per_shard=options.samples_per_shard,
        overwrite=options.overwrite,
        provenance=provenance("data_prep moving", arguments, ("pillow", "av")),
        videos=True,
    )
    render = partial(_record, image_size=options.image_size, num_frames=options.num_frames)
    with writer:
        records = ordered_map(render, items, options.workers if len(items) > 500 else 1)
        for record in progress(records, len(items), f"{output.name}/{split}"):
            writer.add(record)
    assert writer.manifest is not None
    return writer.manifest


def _record(item: tuple[str, MovingScene], image_size: int, num_frames: int) -> Record:
    key, scene = item
    meta: dict[str, Any] = {"main_colour": scene.colour, "main_shape": scene.shape, "way": scene.way}
    clip = clip_of(scene, image_size, num_frames)
    record, rejections = check_record(Record(key, (), (scene.caption,), meta, video=clip), ClipLimits())
    assert record is not None, rejections
    return record
