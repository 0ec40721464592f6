"""Images that are searched by a sentence: each is encoded once, and scored with every sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.using.matching import Matching
from pipeline.using.trained import Trained

AT_ONCE = 32  # images that are scored at a time


class ImageIndex:
    """What texts read of images, [I, P, D] of each on the host, in the order in which they were given."""

    def __init__(self, trained: Trained, matching: Matching, encoded: list[Tensor]) -> None:
        self._trained, self._matching, self._encoded = trained, matching, encoded

    def __len__(self) -> int:
        return len(self._encoded)

    def search(self, text: str, top: int = 10) -> list[tuple[int, float]]:
        """The ``top`` images that the text describes best, (number, score) each, the best first; of equals the one
        given first. Scores are those of ``Model.match``."""
        if top < 1:
            raise ValueError(f"top is {top}, expected 1 or more")
        scores: list[float] = []
        for start in range(0, len(self), AT_ONCE):
            tokens = torch.stack(self._encoded[start : start + AT_ONCE]).to(self._trained.device)
            scores += self._matching.scores(self._trained, tokens, [text] * len(tokens)).tolist()
        order = sorted(range(len(scores)), key=lambda number: -scores[number])
        return [(number, scores[number]) for number in order[:top]]
