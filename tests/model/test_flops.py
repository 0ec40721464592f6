"""The analytic cost against PyTorch's own operation counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model.flops import forward_macs
from model.frozen import freeze
from tests.tiny_flm import VOCABULARY, caption, images, pair_rows, tiny_flm


def plain_attention(query, key, value, attn_mask=None, dropout_p=0.0):
    """The definition, in products that the counter knows on every device."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1) @ value


@pytest.mark.parametrize(("name", "streams"), [("flm", 2), ("mlm", 1), ("ar", 1), ("prefixlm", 1)])
def test_forward_cost_agrees_with_pytorchs_counter(monkeypatch, name: str, streams: int):
    """Within 1 %; FlopCounterMode counts two operations per multiply-accumulate."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    objective = tiny_flm(name=name, **({"corruption_rate": 0.3} if name == "flm" else {}))
    batch = objective.planner(images(3), pair_rows([caption(5), caption(9), caption(2)]))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        objective(batch)
    expected = 2 * sum(forward_macs(objective.config, objective.net.vision, VOCABULARY.size, batch, streams).values())
    assert abs(counter.get_total_flops() / expected - 1) < 0.01
    assert objective.flops(batch) == 3 * expected


def test_the_contrast_costs_its_projections_and_similarities(monkeypatch):
    """What PyTorch's counter finds more, to the operation."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    counts, totals = [], []
    for options in ({}, {"itc_weight": 0.1, "itc_width": 48}):
        objective = tiny_flm(name="mlm", **options)
        batch = objective.planner(images(3), pair_rows([caption(5), caption(9), caption(2)]))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            objective(batch)
        counts.append(counter.get_total_flops())
        totals.append(objective.flops(batch))
    assert counts[1] - counts[0] == 2 * (6 * 32 * 48 + 9 * 48) == (totals[1] - totals[0]) / 3


def test_a_frozen_tower_costs_its_forward_pass_only(monkeypatch):
    """Two thirds of the tower's share go, within 1 % of PyTorch's count."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    trained, frozen = tiny_flm(), tiny_flm()
    frozen.config.vision.frozen = True
    freeze(frozen.net.vision, "somewhere")
    batch = trained.planner(images(3), pair_rows([caption(5), caption(9), caption(2)]))
    with FlopCounterMode(display=False) as counter:
        assert not frozen.net.vision(batch.images[:, 0]).requires_grad
    assert trained.flops(batch) - frozen.flops(batch) == pytest.approx(2 * counter.get_total_flops(), rel=0.01)
