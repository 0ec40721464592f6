"""Scores say which way is better; the pretraining task's do."""

from __future__ import annotations

import math

import pytest

from pipeline.config.options import Config, ConfigError
from pipeline.tasks.pretraining import Pretraining
from pipeline.tasks.task import Score
from pipeline.training.session import refuse_unknown_score
from tests.tiny_flm import tiny_flm


def test_a_score_knows_its_direction() -> None:
    loss, cider = Score("flm_loss", False), Score("cider", True)
    assert loss.improves(1.0, 2.0) and not loss.improves(2.0, 2.0) and not loss.improves(3.0, 2.0)
    assert cider.improves(0.5, 0.4) and not cider.improves(0.4, 0.4) and not cider.improves(0.3, 0.4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_the_best(bad: float) -> None:
    for score in (Score("a", False), Score("b", True)):
        assert not score.improves(bad, None) and not score.improves(bad, 1.0)
        assert score.improves(1.0, None) and score.improves(1.0, bad)


def test_scores_of_pretraining() -> None:
    scores = Pretraining().scores(tiny_flm())
    directions = {score.name: score.higher_is_better for score in scores}
    assert scores[0] == Score("loss", False) and directions["flm_loss"] is False and directions["itm_accuracy"] is True
    assert len(directions) == 1 + 2 * 4
    config = Config()
    for name in (None, "loss", "l2r_accuracy"):
        config.train.keep_best = name
        refuse_unknown_score(config, scores)
    config.train.keep_best = "mlm_loss"
    with pytest.raises(ConfigError, match="found 'mlm_loss', expected one of loss, flm_loss, flm_accuracy"):
        refuse_unknown_score(config, scores)
