"""The benchmark's reference computes the same loss and gradients as our released behaviour, so it is fair."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cost.released_layout import ReleasedLayout
from tests.rounding import TINY
from tests.tiny_flm import MAX_TEXT_LENGTH, caption, images, pair_rows, tiny_flm


def test_released_layout_computes_the_released_loss():
    objective = tiny_flm("released", spread=0.6)
    rows, pictures = (
        pair_rows([caption(4, 1), caption(9, 2), caption(MAX_TEXT_LENGTH - 2, 3), caption(1, 4)]),
        images(4),
    )
    batch = objective.planner(pictures, rows)
    text = torch.full((4, MAX_TEXT_LENGTH), 1)
    for number, row in enumerate(rows):
        text[number, : len(row.token_ids)] = torch.tensor(row.token_ids)
    reference = ReleasedLayout(objective)(pictures[:, 0], text, batch.plan.lengths)
    reference.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in objective.named_parameters() if parameter.grad is not None
    }
    objective.zero_grad()
    ours = sum(objective.term_weights[name] * value / batch.counts[name] for name, value in objective(batch).items())
    ours.backward()
    assert ours.item() == pytest.approx(reference.item(), rel=TINY)
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)
