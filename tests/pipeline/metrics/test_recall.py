"""Recall against a ranking by brute force, ties included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import recall
from pipeline.metrics.recall import ranks, recalls, standard_errors, summarise


def by_brute_force(scores: list[list[float]], owner: list[int], k: int) -> tuple[float, float]:
    """Sort every row and every column; where scores are equal, what is wrong comes first."""
    text_hits = image_hits = 0
    for image, row in enumerate(scores):
        order = sorted(range(len(owner)), key=lambda caption: (-row[caption], owner[caption] == image))
        text_hits += any(owner[caption] == image for caption in order[:k])
    for caption in range(len(owner)):
        order = sorted(range(len(scores)), key=lambda image: (-scores[image][caption], owner[caption] == image))
        image_hits += owner[caption] in order[:k]
    return text_hits / len(scores), image_hits / len(owner)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_recall_is_brute_force(data: st.DataObject) -> None:
    num_images = data.draw(st.integers(1, 6))
    extra = data.draw(st.lists(st.integers(0, num_images - 1), max_size=12))
    owner = data.draw(st.permutations([*range(num_images), *extra]))
    values = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0])  # few values, so many ties
    row = st.lists(values, min_size=len(owner), max_size=len(owner))
    scores = data.draw(st.lists(row, min_size=num_images, max_size=num_images))
    found = recalls(np.array(scores, dtype=np.float32), owner, ks=(1, 2, 5))
    for k in (1, 2, 5):
        assert (found[f"tr_at_{k}"], found[f"ir_at_{k}"]) == by_brute_force(scores, owner, k)


def test_pieces_and_memory_maps_change_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 9, (23, 61)).astype(np.float16)
    owner = generator.permutation(np.concatenate([np.arange(23), generator.integers(0, 23, 38)]))
    whole = ranks(scores, owner)
    monkeypatch.setattr(recall, "_CELLS_AT_A_TIME", 61 * 4)
    np.save(tmp_path / "scores.npy", scores)
    pieces = ranks(np.load(tmp_path / "scores.npy", mmap_mode="r"), owner)
    assert (whole.text == pieces.text).all() and (whole.image == pieces.image).all()


def test_a_constant_score_finds_nothing() -> None:
    found = recalls(np.zeros((20, 100)), np.arange(100) // 5)
    assert found["tr_at_10"] == found["ir_at_10"] == found["mean_recall"] == 0
    assert found["ir_median_rank"] == 20 and found["tr_median_rank"] == 96


def test_captions_per_image_may_differ() -> None:
    """COCO's test images have 25,010 captions, not five each: image 0 has three here."""
    owner = [0, 1, 0, 0, 2]
    scores = np.eye(3)[:, owner]
    found = ranks(scores, owner)
    assert found.text.tolist() == [0, 0, 0] and found.image.tolist() == [0] * 5
    assert standard_errors(found, owner) == dict.fromkeys(
        [f"{side}_at_{k}" for side in ("tr", "ir") for k in (1, 5, 10)], 0.0
    )
    assert summarise(found)["mean_recall"] == 1


@pytest.mark.parametrize(
    ("scores", "owner", "reason"),
    [
        (np.full((2, 2), np.nan), [0, 1], "image 0 and caption 0 is NaN"),
        (np.array([[1.0, 2.0], [0.0, np.nan]]), [0, 1], "image 1 and caption 1 is NaN"),
        (np.zeros((2, 3)), [0, 1], r"expected \[N, M\] and M integers"),
        (np.zeros((2, 2)), [0.0, 1.0], "M integers"),
        (np.zeros((3, 2)), [0, 2], "image 1 has no caption"),
        (np.zeros((2, 3)), [0, 1, 2], r"images 0..2: expected 0..1"),
        (np.zeros((2, 3)), [0, 1, -1], r"images -1..1: expected 0..1"),
        (np.zeros((2, 0)), np.zeros(0, dtype=int), "at least one caption"),
    ],
)
def test_bad_input(scores: np.ndarray, owner: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        recalls(scores, owner)
