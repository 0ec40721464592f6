"""Dropout and random weights against their definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model.build import build_objective
from model.config import FLMOptions, TextConfig, Vocabulary
from model.dropout import dropout, dropout_add
from model.layers import initial_std
from tests.tiny_flm import tiny_config


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    states = torch.ones(601, 333, requires_grad=True)
    dropped = dropout(states, rate)
    share = (dropped == 0).float().mean().item()
    assert share == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / states.numel()))
    torch.testing.assert_close(dropped[dropped != 0], torch.full_like(dropped[dropped != 0], 1 / (1 - rate)))
    by_row = (dropped == 0).float().mean(1)  # elements that share a draw are still independent
    assert by_row.std().item() == pytest.approx(math.sqrt(rate * (1 - rate) / states.shape[1]), rel=0.15)
    (gradient,) = torch.autograd.grad(dropped.sum(), states)
    torch.testing.assert_close(gradient, dropped.detach())


def test_dropout_follows_the_seed() -> None:
    states = torch.ones(5, 7)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(states, 0.5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_rate_of_0_changes_and_draws_nothing() -> None:
    states, before = torch.randn(5, 7), torch.get_rng_state()
    assert torch.equal(dropout(states, 0.0), states) and torch.equal(dropout_add(states, states, 0.0), states + states)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("width", [32, 768])
def test_random_weights_keep_the_variance_at_every_width(width: int) -> None:
    """BERT's 0.02 at its width; a sum over ``width`` inputs of variance 1 has the same variance at any other."""
    assert initial_std(768) == 0.02
    assert width * initial_std(width) ** 2 == pytest.approx(768 * 0.02**2)
    text = TextConfig(width=width, heads=2, ffn_width=64, bottom_layers=1, top_layers=1, max_positions=40)
    vocabulary = Vocabulary(size=61, bos_id=0, pad_id=1, eos_id=2, mask_id=60)
    built = build_objective(replace(tiny_config(), text=text), FLMOptions(), vocabulary, 24)
    matrices = {
        name: parameter
        for name, parameter in built.named_parameters()
        if parameter.ndim > 1 and not name.startswith("net.vision")
    }
    assert len(matrices) > 20
    for name, matrix in matrices.items():
        sampling_error = initial_std(width) * (2 * matrix.numel()) ** -0.5
        assert matrix.std().item() == pytest.approx(initial_std(width), abs=5 * sampling_error), name
