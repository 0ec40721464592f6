"""The questions that a model answers for several requests at once, each with what its requests must share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.batching.model import Model


@dataclass(frozen=True)
class Captions:
    """Captions of images with the same settings."""

    prompt: str = ""
    beams: int | None = None
    max_tokens: int | None = None

    def __call__(self, model: Model, items: Sequence[Image.Image]) -> list[str]:
        return model.caption(
            list(items), self.prompt, beams=self.beams, max_tokens=self.max_tokens, batch_size=len(items)
        )


@dataclass(frozen=True)
class Answers:
    """The ``top`` most likely answers to (image, question)."""

    top: int = 1

    def __call__(self, model: Model, items: Sequence[tuple[Image.Image, str]]) -> list[list[tuple[str, float | None]]]:
        images, questions = ([item[place] for item in items] for place in (0, 1))
        found = model.answer(images, questions, top=self.top, batch_size=len(items))
        return [answer if isinstance(answer, list) else [answer] for answer in found]


@dataclass(frozen=True)
class Matches:
    """How well each of its texts describes the image of a request (image, texts)."""

    def __call__(self, model: Model, items: Sequence[tuple[Image.Image, list[str]]]) -> list[list[float]]:
        images = [image for image, texts in items for _ in texts]
        scores = np.asarray(model.match(images, [text for _, texts in items for text in texts])).tolist()
        ends = np.cumsum([len(texts) for _, texts in items]).tolist()
        return [scores[end - len(texts) : end] for end, (_, texts) in zip(ends, items, strict=True)]


@dataclass(frozen=True)
class Attention:
    """Where the words of (image, text) looked."""

    def __call__(self, model: Model, items: Sequence[tuple[Image.Image, str]]) -> list[dict[str, Any]]:
        found = (model.attention(*item) for item in items)
        return [{"words": list(words), "maps": np.round(maps, 5).tolist()} for words, maps in found]


@dataclass(frozen=True)
class Merges:
    """Which patches of an image were merged."""

    def __call__(self, model: Model, items: Sequence[Image.Image]) -> list[list[list[int]]]:
        return [np.asarray(model.merges(image)).tolist() for image in items]
