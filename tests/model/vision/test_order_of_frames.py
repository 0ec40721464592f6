"""Drawn clips that only the order of frames tells apart: who knows it learns them, who does not guesses."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from data_prep.drawn.moving_scenes import clip_of, draw_moving_scene
from model.config import VisionConfig
from model.vision.tower import build_tower, tokens_of
from pipeline.data.shard_reader import RawSample
from pipeline.data.transforms import clip_transform
from pipeline.pictures.pictures import Pictures

WAYS, FRAMES = ("left", "right"), 4
PICTURES = Pictures(clip_transform(32), num_frames=FRAMES)


def clips(count: int, generator: random.Random) -> tuple[Tensor, Tensor]:
    """uint8 [count, 4, 3, 32, 32] and the ways as numbers, as many of either."""
    scenes = [dataclasses.replace(draw_moving_scene(generator), way=WAYS[n % 2]) for n in range(count)]
    pixels = [PICTURES.of(RawSample("k", [], "", {}, video=clip_of(scene, 32, 16))) for scene in scenes]
    return torch.stack(pixels), torch.arange(count) % 2


def accuracy(temporal: str, steps: int = 260) -> float:
    """On held-out clips, of a small tower with a linear classifier on its mean token."""
    generator = random.Random(0)
    (pixels, ways), (held_out, truth) = clips(400, generator), clips(100, generator)
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16, drop_last_block=False)
    tower = build_tower(VisionConfig(name=None, temporal=temporal, **sizes))
    head = torch.nn.Linear(32, 2)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=2e-3)

    def scores(images: Tensor) -> Tensor:
        return head(tokens_of(tower, images, FRAMES).unflatten(0, (-1, FRAMES)).mean((1, 2)))

    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(0, len(pixels), (16,), generator=draws)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores(pixels[chosen]), ways[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((scores(held_out).argmax(1) == truth).float().mean())


@pytest.mark.extended
@pytest.mark.timeout(600)
def test_left_and_right() -> None:
    """Guessing is right for 0.5 of 100 clips, give or take 3 standard deviations of 0.05."""
    assert accuracy("released") < 0.65
    assert accuracy("ordered") > 0.9
