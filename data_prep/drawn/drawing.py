"""Draws synthetic scenes: as JPEGs, and things alone."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from data_prep.drawn.scenes import Scene, Thing

_RGB = {
    "red": (220, 30, 35),
    "green": (25, 150, 50),
    "blue": (35, 65, 215),
    "yellow": (245, 220, 30),
    "orange": (245, 125, 15),
    "purple": (135, 40, 165),
    "cyan": (40, 205, 225),
    "black": (20, 20, 20),
}
_SUPERSAMPLING = 2
_JPEG_QUALITY = 92
_NOISE = 14  # standard deviation in grey levels


def draw_jpeg(scene: Scene, image_size: int) -> bytes:
    """The scene as a square JPEG of ``image_size`` pixels a side."""
    side = image_size * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), (scene.grey,) * 3)
    if scene.background == "noisy":
        image = _noisy(scene, image_size).resize((side, side), Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(canvas, thing, side)
    image = image.resize((image_size, image_size), Image.Resampling.BOX)
    stream = io.BytesIO()
    # 4:4:4: at half the colour resolution a small object would mix its colour with the background.
    image.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return stream.getvalue()


def draw_things(things: Sequence[Thing], grey: int, image_size: int) -> Image.Image:
    """Things on a plain background of ``grey``, as a square image of ``image_size`` pixels a side."""
    side = image_size * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), (grey,) * 3)
    canvas = ImageDraw.Draw(image)
    for thing in things:
        _draw_thing(canvas, thing, side)
    return image.resize((image_size, image_size), Image.Resampling.BOX)


def _noisy(scene: Scene, size: int) -> Image.Image:
    noise = np.random.default_rng(scene.noise_seed).normal(scene.grey, _NOISE, (size, size))
    grey = np.clip(np.rint(noise), 0, 255).astype(np.uint8)
    return Image.fromarray(np.repeat(grey[:, :, None], 3, axis=2))


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    x, y, radius, colour = thing.x * side, thing.y * side, thing.radius * side, _RGB[thing.colour]
    if thing.shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif thing.shape == "ring":
        box = (x - radius, y - radius, x + radius, y + radius)
        canvas.ellipse(box, outline=colour, width=max(2, round(radius * 0.42)))
    elif thing.shape == "square":
        half = radius * 0.88
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif thing.shape == "cross":
        arm = radius * 0.32
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)
    else:
        corners, inner = (3, 1.0) if thing.shape == "triangle" else (5, 0.42)
        canvas.polygon(_star(x, y, radius * 1.1, corners, inner), fill=colour)


def _star(x: float, y: float, radius: float, points: int, inner: float) -> list[tuple[float, float]]:
    """Corners of a star, point up; ``inner`` is the radius of the notches, 1.0 leaves a regular polygon."""
    steps = points if inner == 1.0 else 2 * points
    corners = []
    for step in range(steps):
        angle = 2 * math.pi * step / steps - math.pi / 2
        reach = radius if inner == 1.0 or step % 2 == 0 else radius * inner
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return corners
