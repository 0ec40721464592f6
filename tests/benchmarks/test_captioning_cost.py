"""The benchmark of captioning compares equal things: same captions, same scores, on a tiny model."""

from __future__ import annotations

import torch

from benchmarks.cost.captioning import measure
from model.build import build_captioning
from model.config import FLMOptions
from tests.rounding import TINY
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, images, tiny_config


def test_both_ways_write_the_same_captions() -> None:
    torch.manual_seed(3)
    objective = build_captioning(tiny_config("released", dropout=0.5), FLMOptions(), VOCABULARY, MAX_TEXT_LENGTH).eval()
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                parameter.mul_(1.6)
        objective.lm_head.weight[list(objective.form.end_ids)] *= 4
    found = measure(objective, images(5, seed=2), 8, 2)
    assert found["same_captions"] and found["largest_difference_of_scores"] < 100 * TINY
    assert 0 < found["words"] < 40, "some captions end"
    assert len(found["seconds"]["cached"]) == len(found["seconds"]["rerun"]) == 2
