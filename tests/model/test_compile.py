"""The objective is one graph for torch.compile: no breaks, few shapes, the same numbers, in training with dropout."""

from __future__ import annotations

import pytest
import torch

from model.build import build_objective
from model.config import FLMOptions
from model.cpu import door
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, caption, images, pair_rows, tiny_config

BATCHES = [[4, 7, 2], [5, 9, 3], [6, 3, 11], [2, 2, 2, 9], [12, 5], [3, 8, 1, 6, 14]]  # words of each caption


@pytest.mark.extended  # one graph, without the lengths: test_recomputing
@pytest.mark.slow(60)
def test_training_compiles_as_one_graph_for_all_lengths():
    """Forward and backward of the training graph traced whole (backend without code generation), same random numbers.

    Batches of other sizes, lengths and numbers of targets make no new graph once shapes have become dynamic.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = tiny_config(dropout=0.2)
    model.vision.layers, model.text.bottom_layers, model.text.top_layers = 2, 1, 1  # further layers are the same code
    options = FLMOptions(corruption_rate=0.4)
    objective = build_objective(model, options, VOCABULARY, MAX_TEXT_LENGTH).double().train()
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    parameters = [parameter for name, parameter in objective.named_parameters() if parameter.requires_grad]

    def run(function, words: list[int]) -> list[torch.Tensor]:
        batch = objective.planner(images(len(words)), pair_rows([caption(k, k) for k in words]))
        torch.manual_seed(len(words))
        losses = function(batch)
        return [*losses.values(), *torch.autograd.grad(sum(losses.values()), parameters, materialize_grads=True)]

    graphs = []
    for words in BATCHES:
        traced = run(compiled, words)
        with door.shut():
            eager = run(objective, words)
        for ours, theirs in zip(traced, eager, strict=True):
            # Losses are computed in fp32, as sums over 61 words of numbers below 16 and over some 50 targets.
            tolerance = 64 * 16 * torch.finfo(torch.float32).eps
            assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-12
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[3] <= 3, graphs  # fixed shapes, dynamic lengths, a dynamic number of captions too
