"""The objective is one graph for torch.compile: no breaks, few shapes, the same numbers."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_flm import caption, images, pair_rows, tiny_flm


@pytest.mark.slow
def test_the_objective_compiles_as_one_graph_for_all_lengths():
    """Forward and backward traced whole (backend without code generation), for batches of other sizes and lengths."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    objective = tiny_flm(corruption_rate=0.4).double()  # sums in another order differ by less than the tolerance
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    watched = [objective.net.embedding.word.weight, objective.lm_head.weight]
    for words in ([4, 7, 2], [5, 9, 3], [6, 3, 11], [2, 2, 2, 9]):
        batch = objective.planner(images(len(words)), pair_rows([caption(k, k) for k in words]))
        results = []
        for function in (objective, compiled):
            losses = function(batch)
            gradients = torch.autograd.grad(sum(losses.values()), watched)
            results.append([*losses.values(), *gradients])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4  # shapes become dynamic, not many graphs
