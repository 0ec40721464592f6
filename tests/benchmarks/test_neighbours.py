"""Captions of neighbours: which image is near, which caption they agree on, what a person's scores are."""

from __future__ import annotations

import pytest
import torch

from benchmarks.probes.neighbours import consensus, scores
from pipeline.metrics.cider import DocumentFrequencies, cider_d, plain_words

DOG, CAT, CAR = "a dog runs on the grass", "a cat sleeps on a sofa", "a red car on the road"


def frequencies(captions: list[list[str]]) -> DocumentFrequencies:
    return DocumentFrequencies.of([[plain_words(text) for text in of_image] for of_image in captions])


def test_the_consensus_is_the_caption_that_resembles_the_others_most() -> None:
    captions = [[DOG], [DOG + " today"], ["dogs on grass"], [CAR]]
    assert consensus(captions, frequencies([*captions, [CAT]])) == DOG


def test_the_nearest_image_is_the_nearest_in_standardised_channels() -> None:
    """The first channel is a thousand times as wide as the second, which alone tells the images apart."""
    known = torch.tensor([[1000.0, 1.0], [-1000.0, 1.0], [1000.0, -1.0], [-1000.0, -1.0]])
    captions = [[DOG], [DOG], [CAT], [CAT]]
    asked = torch.tensor([[10.0, 0.9], [0.0, -0.9]])
    references = [[DOG, "the dog runs on the green grass"], [CAT, "the cat sleeps on the sofa"]]
    found = scores(known, captions, asked, references)
    assert found["nearest_caption"] == cider_d([DOG, CAT], references)
    both = [cider_d([a, b], [[references[0][1]], [references[1][1]]]) for a, b in [(DOG, CAT)]]
    other = [cider_d([r[1] for r in references], [[r[0]] for r in references])]
    assert found["person"] == pytest.approx((both[0] + other[0]) / 2, rel=1e-12)


def test_a_person_needs_a_second_caption() -> None:
    with pytest.raises(ValueError, match="single caption"):
        scores(torch.randn(3, 2), [[DOG], [CAT], [CAR]], torch.randn(1, 2), [[DOG]])
