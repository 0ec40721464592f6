"""Losses and counts of rankings, against cross entropies of scores that are computed pair by pair."""

from __future__ import annotations

import math

import pytest
import torch

from model.batch import Row
from model.build import build_ranking
from model.config import objective_options
from model.objectives.ranking import Ranking
from tests.rounding import TINY
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, caption, images, tiny_config

NAMES = ["flm", "mlm", "ar", "prefixlm"]


def built(name: str = "flm", behaviour: str = "default", in_batch: int | None = None) -> Ranking:
    torch.manual_seed(0)
    objective = build_ranking(tiny_config(behaviour), objective_options(name), VOCABULARY, MAX_TEXT_LENGTH, in_batch)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                parameter.mul_(1.6)
    return objective.eval()


def score_of(objective: Ranking, picture: torch.Tensor, ids: list[int]) -> float:
    batch = objective.reading_planner(picture[None], [Row(ids, 0, 0, "read")])
    term = batch.terms["read"]
    return float(objective.match(getattr(objective.net(batch), term.source)[term.position]).detach())


def losses_of(rankings: list[list[float]]) -> float:
    return sum(math.log(sum(math.exp(score - scores[0]) for score in scores)) for scores in rankings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("behaviour", ["default", "released"])
def test_loss_is_the_cross_entropy_of_candidates_scored_one_by_one(name: str, behaviour: str) -> None:
    if (name, behaviour) == ("prefixlm", "released"):
        pytest.skip("there is no such release")
    objective, pictures = built(name, behaviour), images(2)
    texts = [[caption(4, 1), caption(6, 2), caption(3, 3)], [caption(5, 4), caption(4, 5)]]
    rows = [Row(ids, image, 0, "read") for image, own in enumerate(texts) for ids in own]
    batch = objective.planner(pictures, rows)
    rankings = [[score_of(objective, pictures[image], ids) for ids in own] for image, own in enumerate(texts)]
    assert float(objective(batch)["i2t"].detach()) == pytest.approx(losses_of(rankings), abs=1e-5)
    loss, correct = objective.score(batch)["i2t"]
    assert float(loss) == pytest.approx(losses_of(rankings), abs=1e-5)
    assert int(correct) == sum(scores[0] > max(scores[1:]) for scores in rankings)


def test_in_batch_losses_both_ways() -> None:
    objective, pictures = built(in_batch=15), images(3)
    texts = [caption(words, words) for words in (4, 6, 3)]
    batch = objective.planner(pictures, [Row(ids, n, n, "read", str(n)) for n, ids in enumerate(texts)])
    scores = [[score_of(objective, picture, ids) for ids in texts] for picture in pictures]
    first = lambda values, number: [values[number], *values[:number], *values[number + 1 :]]  # noqa: E731
    rows = [first(values, number) for number, values in enumerate(scores)]
    columns = [first(list(values), number) for number, values in enumerate(zip(*scores, strict=True))]
    found = objective(batch)
    assert float(found["i2t"].detach()) == pytest.approx(losses_of(rows), abs=1e-5)
    assert float(found["t2i"].detach()) == pytest.approx(losses_of(columns), abs=1e-5)


def test_equal_scores_are_not_correct() -> None:
    objective = built()
    torch.nn.init.zeros_(objective.rank_head.weight)  # equal texts alone need not have scores equal to the last bit
    batch = objective.planner(images(1), [Row(caption(4, 1), 0, 0, "read"), Row(caption(4, 2), 0, 0, "read")])
    loss, correct = objective.score(batch)["i2t"]
    assert correct == 0 and float(loss) == pytest.approx(math.log(2), rel=TINY)


@pytest.mark.parametrize("in_batch", [None, 2])
def test_gradients_reach_everything_that_scores_depend_on(in_batch: int | None) -> None:
    objective = built(in_batch=in_batch)
    rows = [Row(caption(4 + n, n), n, n, "read", str(n)) for n in range(3)]
    if in_batch is None:
        rows = [Row(caption(4 + n, n), n // 2, n, "read") for n in range(4)]
    losses = objective(objective.planner(images(3), rows))
    sum(losses.values()).backward()
    without = {name for name, p in objective.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    without.discard("rank_head.bias")  # it moves all scores alike: its gradient is 0 but for rounding
    assert without <= {name for name in without if "position" in name or "word" in name}, without
