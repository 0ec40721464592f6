"""The grammar of the synthetic corpora: scenes, their captions, questions, and statements about pairs of scenes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RADII = {"large": (0.25, 0.28), "medium": (0.165, 0.185), "small": (0.085, 0.10)}  # share of the image side
SIDES = {"left": (0.30, 0.34), "middle": (0.48, 0.52), "right": (0.66, 0.70)}
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
NUMBERS = ("zero", "one", "two", "three", "four")
BACKGROUNDS = ("plain", "noisy")


@dataclass(frozen=True)
class Thing:
    """A drawn object; its centre ``x``, ``y`` (from the upper left corner) and ``radius`` are shares of the side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def words(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects on a neutral background; the first is the main object, clearly larger than the others.

    ``layout`` is the caption form: ``side`` (one object), ``relation`` (a second one beside the main object),
    ``count`` (two or three equal ones) or ``list`` (two different ones, left to right).
    """

    layout: str
    things: tuple[Thing, ...]
    relation: str  # of the main object to the second one; for one object its side
    background: str
    grey: int  # 0..255
    noise_seed: int

    @property
    def main(self) -> Thing:
        return self.things[0]

    def identity(self) -> bytes:
        """A digest of the scene without its noise: equal for scenes whose pictures differ in noise only."""
        description = {**asdict(self), "noise_seed": 0}
        return hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=16).digest()


def draw_scene(rng: random.Random) -> Scene:
    """A random scene; every factor is independent of the colour and shape of the main object."""
    layout = rng.choices(("side", "relation", "count", "list"), weights=(3, 4, 2, 1))[0]
    main_size = rng.choice(("large", "medium"))
    if layout == "side":
        things, relation = _place_alone(rng, main_size)
    elif layout == "relation":
        things, relation = _place_related(rng, main_size)
    else:
        things, relation = _place_with_row(rng, main_size, layout)
    return Scene(layout, things, relation, rng.choice(BACKGROUNDS), rng.randrange(185, 236), rng.getrandbits(32))


def _thing(rng: random.Random, size: str, x: float, y: float, look: tuple[str, str] | None = None) -> Thing:
    shape, colour = look or (rng.choice(SHAPES), rng.choice(COLOURS))
    return Thing(shape, colour, size, round(x, 3), round(y, 3), round(rng.uniform(*RADII[size]), 3))


def _place_alone(rng: random.Random, size: str) -> tuple[tuple[Thing, ...], str]:
    side = rng.choice(tuple(SIDES))
    return (_thing(rng, size, rng.uniform(*SIDES[side]), rng.uniform(0.35, 0.65)),), side


def _place_related(rng: random.Random, size: str) -> tuple[tuple[Thing, ...], str]:
    """Main object and a small one on a clear axis: the offset across it is small."""
    relation = rng.choice(tuple(OPPOSITE))
    near, far = rng.uniform(0.32, 0.38), rng.uniform(0.84, 0.88)  # along the axis, main object first
    if relation in ("below", "right of"):
        near, far = 1 - near, 1 - far
    across_main = rng.uniform(0.42, 0.58)
    across_other = across_main + rng.uniform(-0.1, 0.1)
    vertical = relation in ("above", "below")
    main_xy = (across_main, near) if vertical else (near, across_main)
    other_xy = (across_other, far) if vertical else (far, across_other)
    return (_thing(rng, size, *main_xy), _thing(rng, "small", *other_xy)), relation


def _place_with_row(rng: random.Random, size: str, layout: str) -> tuple[tuple[Thing, ...], str]:
    """Main object and a row of small ones, above or below it, from left to right."""
    relation = rng.choice(("above", "below"))
    number = rng.choice((2, 3)) if layout == "count" else 2
    look = (rng.choice(SHAPES), rng.choice(COLOURS)) if layout == "count" else None
    main_y, row_y = rng.uniform(0.32, 0.38), rng.uniform(0.84, 0.88)
    if relation == "below":
        main_y, row_y = 1 - main_y, 1 - row_y
    main = _thing(rng, size, rng.uniform(0.4, 0.6), main_y)
    places = [(position + 0.5) / number + rng.uniform(-0.04, 0.04) for position in range(number)]
    row = [_thing(rng, "small", x, row_y + rng.uniform(-0.01, 0.01), look) for x in places]
    if layout == "list":  # two different things, or the caption would be a count
        while (row[1].shape, row[1].colour) == (row[0].shape, row[0].colour):
            row[1] = _thing(rng, "small", row[1].x, row[1].y)
    return (main, *row), relation


def captions(scene: Scene, number: int) -> list[str]:
    """The first ``number`` captions of a scene, a pure function of it; the first one is the canonical form."""
    body = _describe(scene)
    background = f"a {scene.background} background"
    forms = [
        body,
        f"there is {body}",
        f"{body} on {background}",
        f"a picture of {body}",
        f"on {background} there is {body}",
    ]
    return forms[:number]


MAX_CAPTIONS = 5


def _describe(scene: Scene) -> str:
    main, others = scene.main, scene.things[1:]
    if scene.layout == "side":
        place = "in the middle" if scene.relation == "middle" else f"on the {scene.relation}"
        return f"a {main.words} {place}"
    if scene.layout == "relation":
        return f"a {main.words} {scene.relation} a {others[0].words}"
    if scene.layout == "count":
        return f"a {main.words} {scene.relation} {NUMBERS[len(others)]} {_plural(others[0].words)}"
    return f"a {main.words} {scene.relation} a {others[0].words} and a {others[1].words}"


def _plural(words: str) -> str:
    return words + ("es" if words.endswith("cross") else "s")


def questions(scene: Scene, rng: random.Random) -> list[dict[str, str]]:
    """Questions with one-word answers about a scene; yes and no are equally likely."""
    main = scene.main
    asked = [
        ("what colour is the largest object?", main.colour, "colour"),
        ("what shape is the largest object?", main.shape, "shape"),
        ("how many objects are there?", NUMBERS[len(scene.things)], "count"),
    ]
    looks = {(thing.colour, thing.shape) for thing in scene.things}
    absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in looks]
    present = rng.random() < 0.5
    colour, shape = rng.choice(sorted(looks)) if present else rng.choice(absent)
    article = "an" if colour == "orange" else "a"
    asked.append((f"is there {article} {colour} {shape}?", "yes" if present else "no", "existence"))
    if scene.layout == "relation":
        other = scene.things[1]
        true = rng.random() < 0.5
        relation = scene.relation if true else OPPOSITE[scene.relation]
        question = f"is the {main.words} {relation} the {other.words}?"
        asked.append((question, "yes" if true else "no", "relation"))
    return [{"question": question, "answer": answer, "type": kind} for question, answer, kind in asked]


def scene_meta(scene: Scene, rng: random.Random) -> dict[str, Any]:
    """What the JSON member of a scene holds besides its captions."""
    return {
        "main_colour": scene.main.colour,
        "main_shape": scene.main.shape,
        "questions": questions(scene, rng),
        "scene": asdict(scene),
    }


def draw_pair(rng: random.Random) -> tuple[Scene, Scene, str, bool]:
    """Two scenes and a statement about them that is true or false with equal chance."""
    wanted = rng.random() < 0.5
    statement, holds = rng.choice(_STATEMENTS)(rng)
    while True:  # each statement is true of a share of all pairs that is far from 0 and from 1
        left, right = draw_scene(rng), draw_scene(rng)
        if holds(left, right) == wanted:
            return left, right, statement, wanted


Statement = tuple[str, Callable[[Scene, Scene], bool]]


def _both_contain(rng: random.Random) -> Statement:
    shape = rng.choice(SHAPES)
    return f"both images contain a {shape}", lambda left, right: _has(left, shape) and _has(right, shape)


def _one_side_contains(rng: random.Random) -> Statement:
    colour, left_side = rng.choice(COLOURS), rng.random() < 0.5
    side = "left" if left_side else "right"
    text = f"the {side} image contains something {colour}"
    return text, lambda left, right: _has(left if left_side else right, colour)


def _exactly_one(rng: random.Random) -> Statement:
    colour = rng.choice(COLOURS)
    text = f"exactly one of the images contains something {colour}"
    return text, lambda left, right: _has(left, colour) != _has(right, colour)


def _more_objects(rng: random.Random) -> Statement:
    first, second = rng.choice((("left", "right"), ("right", "left")))
    text = f"there are more objects in the {first} image than in the {second} image"
    sign = 1 if first == "left" else -1
    return text, lambda left, right: sign * (len(left.things) - len(right.things)) > 0


def _total(rng: random.Random) -> Statement:
    total = rng.choice((3, 4, 5))
    text = f"there are {('three', 'four', 'five')[total - 3]} objects in total"
    return text, lambda left, right: len(left.things) + len(right.things) == total


def _same_main(rng: random.Random) -> Statement:
    attribute = rng.choice(("colour", "shape"))
    text = f"the largest objects of the two images have the same {attribute}"
    return text, lambda left, right: getattr(left.main, attribute) == getattr(right.main, attribute)


_STATEMENTS = (_both_contain, _one_side_contains, _exactly_one, _more_objects, _total, _same_main)


def _has(scene: Scene, word: str) -> bool:
    return any(word in (thing.colour, thing.shape) for thing in scene.things)
