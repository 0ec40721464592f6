"""What the server asks of a trained model: the members of ``openflm.load`` that it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np
from PIL import Image


class Index(Protocol):
    """Pictures prepared for searching."""

    def search(self, text: str, top: int = 10) -> list[tuple[int, float]]:
        """(number of a picture, score) of the ``top`` best, best first."""


class Model(Protocol):
    """A trained model. A question it can't be asked is a ValueError of one line."""

    name: str
    task: str
    objective: str
    image_size: int
    match_meaning: str

    def caption(
        self,
        images: Sequence[Image.Image],
        prompt: str = "",
        beams: int | None = None,
        max_tokens: int | None = None,
        batch_size: int = 32,
    ) -> list[str]: ...

    def caption_stream(self, image: Image.Image, prompt: str = "", max_tokens: int | None = None) -> Iterator[str]:
        """The caption so far, a piece of a word more each time."""

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[str], top: int = 1, batch_size: int = 32
    ) -> list[tuple[str, float | None]] | list[list[tuple[str, float | None]]]: ...

    def match(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """fp32 [len(images)], how well each text describes its image."""

    def index(
        self,
        images: Sequence[Image.Image],
        batch_size: int = 32,
        progress: Callable[[int, int], object] | None = None,
    ) -> Index: ...

    def attention(self, image: Image.Image, text: str) -> tuple[list[str], np.ndarray]:
        """Words of the text, and where each looked: fp32 [words, rows, columns]."""

    def merges(self, image: Image.Image) -> np.ndarray:
        """int [rows, columns]: patches with equal numbers were merged into one token."""


@dataclass(frozen=True)
class Abilities:
    """What a loaded model can do, as the page and ``GET /model`` show it."""

    caption: bool
    answer: bool
    match: bool
    search: bool
    attention: bool
    merges: bool


def abilities_of(model: Model) -> Abilities:
    """What the model can do with single pictures: it is asked everything about a grey one, which makes that first call
    the slow one. Raises ValueError if it can do nothing."""
    grey = Image.new("RGB", (64, 64), "grey")

    def is_able(ask: Callable[[], object]) -> bool:
        try:
            ask()
        except ValueError:
            return False
        return True

    found = Abilities(
        caption=is_able(lambda: model.caption([grey], max_tokens=2)),
        answer=is_able(lambda: model.answer([grey], ["what is this"])),
        match=is_able(lambda: model.match([grey], ["a picture"])),
        search=is_able(lambda: model.index([grey]).search("a picture", 1)),
        attention=is_able(lambda: model.attention(grey, "a picture")),
        merges=is_able(lambda: model.merges(grey)),
    )
    if not any(astuple(found)):
        raise ValueError(
            f"{model.name}, task {model.task}: this model says nothing of single pictures; serve one that captions"
        )
    return found
