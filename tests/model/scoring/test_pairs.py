"""Scores of image x caption equal those of the whole network run on each pair by itself."""

from __future__ import annotations

import pytest
import torch

from model.batch import Row
from model.scoring import pairs
from tests.tiny_flm import caption, images, tiny_flm

CAPTIONS = [caption(words, seed) for seed, words in enumerate([5, 1, 9, 3, 5, 9, 2, 14, 5])]
CAPTIONS += [CAPTIONS[0], CAPTIONS[2][:6] + CAPTIONS[5][6:], CAPTIONS[4][:3] + CAPTIONS[0][3:], CAPTIONS[5][:4] + [2]]
OBJECTIVES = {
    "flm": {},
    "mlm": {},
    "ar": {},
    "prefixlm": {},
    "prefixlm, none": {"prefix_share": 0.0},
    "prefixlm, half": {"prefix_share": 0.5},
    "flm, released": {},
    "mlm, released": {},
    "ar, released": {},
}


def built(name: str, **options) -> torch.nn.Module:
    objective, _, behaviour = name.partition(", ")
    behaviour = "released" if behaviour == "released" else "default"
    return tiny_flm(behaviour, name=objective, **OBJECTIVES.get(name, {}), **options)


def head(objective: torch.nn.Module):
    torch.manual_seed(3)
    linear = torch.nn.Linear(32, 1)
    return lambda features: linear(objective.net.pooler(features))[:, 0]


def score(objective: torch.nn.Module, captions: pairs.Captions, picture: torch.Tensor) -> torch.Tensor:
    return pairs.score_captions(objective.net, head(objective), captions, pairs.encode_image(objective.net, picture))


@torch.no_grad()
def score_from_scratch(objective: torch.nn.Module, pixels: torch.Tensor, token_ids: list[int]) -> float:
    batch = objective.planner(pixels[None, None], [Row(token_ids, 0, 0, "read")])
    term = batch.terms["read"]
    return float(head(objective)(getattr(objective.net(batch), term.source)[term.position]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_scores_are_those_of_every_pair_from_scratch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_scores(built(name), monkeypatch)


@pytest.mark.parametrize("boundary", [False, True])
@pytest.mark.parametrize("depth", [(2, 2), (0, 1), (1, 2), (0, 0)])
def test_scores_with_any_depth_of_the_reconstructor(
    depth: tuple[int, int], boundary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = built("flm")
    net = objective.net
    net.boundary_states = boundary
    for half, kept in zip((net.reconstructor_bottom, net.reconstructor_top), depth, strict=True):
        del half[: len(half) - kept]
    check_scores(objective, monkeypatch, least_spread=1e-2 if boundary or sum(depth) else 0.0)


def check_scores(objective: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, least_spread: float = 1e-2) -> None:
    """Scores of two pictures with all captions by pairs, and one by one."""
    monkeypatch.setattr(pairs, "BLOCK_CAPTIONS", 5)  # several blocks, a short one last
    pictures = images(2)[:, 0]
    captions = pairs.encode_captions(objective.net, objective.planner, CAPTIONS)
    for picture in pictures:
        scores = score(objective, captions, picture)
        expected = torch.tensor([score_from_scratch(objective, picture, ids) for ids in CAPTIONS])
        assert expected.std() >= least_spread
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
