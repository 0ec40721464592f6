"""A model that needs no training, behind the real server: python -m tests.pipeline.serving.fake_model FOLDER [OPTIONS]

It tells the colour of a picture. Environment variables make it slow: SECONDS_A_CALL, SECONDS_A_WORD, SECONDS_TO_LOAD.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from PIL import Image

from data_prep.program import run_program
from pipeline import serve
from pipeline.serving import starting

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}


def wait(name: str) -> None:
    time.sleep(float(os.environ.get(name, 0)))


def colour(image: Image.Image) -> str:
    mean = np.asarray(image, np.float64).mean((0, 1))
    return min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())


class FakeIndex:
    def __init__(self, images: Sequence[Image.Image]) -> None:
        self._colours = [colour(image) for image in images]

    def search(self, text: str, top: int = 10) -> list[tuple[int, float]]:
        scores = [(number, float(one in text)) for number, one in enumerate(self._colours)]
        return sorted(scores, key=lambda one: -one[1])[:top]


class FakeModel:
    """As tests of the server need it: a question "crash" fails as a bug does, "refuse" as a wrong question does."""

    name, task, objective, image_size = "a fake model", "captioning", "flm", 32
    match_meaning = "1 where the text names the colour"

    def caption(self, images, prompt="", beams=None, max_tokens=None, batch_size=32):
        assert len(images) <= batch_size
        if images[0].size != (64, 64):  # the server tries it with a grey picture
            wait("SECONDS_A_CALL")
        return [self._words(image, prompt, max_tokens) for image in images]

    def caption_stream(self, image, prompt="", max_tokens=None) -> Iterator[str]:
        if prompt == "refuse":
            raise ValueError("this prompt is refused")
        for text in accumulate(self._words(image, prompt, max_tokens).split(), "{} {}".format):
            wait("SECONDS_A_WORD")
            yield text

    def _words(self, image: Image.Image, prompt: str, max_tokens: int | None) -> str:
        if prompt == "crash":
            raise RuntimeError("out of luck")
        if prompt == "refuse":
            raise ValueError("this prompt is refused")
        words = f"{prompt} a {colour(image)} thing on a quiet background".split()
        return " ".join(words[:max_tokens])

    def answer(self, images, questions, top=1, batch_size=32):
        if images[0].size != (64, 64):
            wait("SECONDS_A_CALL")
        if "crash" in questions:
            raise RuntimeError("out of luck")
        if "refuse" in questions:
            raise ValueError("this question is refused")
        found = [[(colour(image), 0.75), ("none", 0.25)][:top] for image in images]
        return found if top > 1 else [one[0] for one in found]

    def match(self, images, texts):
        return np.array([float(colour(image) in text) for image, text in zip(images, texts, strict=True)], np.float32)

    def index(self, images, batch_size=32, progress=None):
        return FakeIndex(images)

    def attention(self, image, text):
        words = text.split()
        places = np.arange(16).reshape(4, 4)
        return words, np.stack([np.exp(-((places - number * 3) ** 2) / 8) for number in range(len(words))])

    def merges(self, image):
        return np.arange(16).reshape(4, 4) // 3


def load(options: object) -> FakeModel:
    wait("SECONDS_TO_LOAD")
    return FakeModel()


def main(arguments: list[str] | None = None) -> int:
    starting.load = load
    return serve.main(arguments)


if __name__ == "__main__":
    run_program(main)
