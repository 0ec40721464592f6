"""Training with dropout on a CPU, row by row and through the padded grid that GPUs use: no leak, right gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from model.attention import Packing, text_attention
from model.batch import Batch
from model.build import build_objective
from model.config import objective_options
from model.cpu import door
from model.cpu.row_attention import RowAttention
from model.layers import PAD_POSITION
from tests.tiny_flm import MAX_TEXT_LENGTH, VOCABULARY, caption, images, pair_rows, tiny_config, with_text

RATE = 0.2
OBJECTIVES = [("default", "flm"), ("default", "mlm"), ("default", "ar"), ("default", "prefixlm"), ("released", "flm")]


@pytest.fixture(params=["row by row", "through the grid"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "row by row":
        yield request.param
    else:
        with door.shut():
            yield request.param


def training(behaviour: str, name: str) -> tuple[nn.Module, Batch]:
    """An objective in double with dropout and weights whose effect is visible, and a batch of rows of all lengths."""
    torch.manual_seed(0)
    rate = 0.0 if behaviour == "released" else 0.4
    config = objective_options(name, **({"corruption_rate": rate} if name == "flm" else {}))
    built = build_objective(tiny_config(behaviour, dropout=RATE), config, VOCABULARY, MAX_TEXT_LENGTH).double().train()
    with torch.no_grad():
        for parameter_name, parameter in built.named_parameters():
            if parameter.ndim > 1 and "vision" not in parameter_name:
                parameter.mul_(1.6)
    rows = pair_rows([caption(5, 1), caption(8, 2), caption(1, 3), caption(14, 4)])
    return built, built.planner(images(4), rows)


def outputs(objective: nn.Module, batch: Batch, seed: int = 3) -> dict[str, Tensor]:
    """What predictions are made from, states of every stream and queries, with the random numbers of ``seed``."""
    torch.manual_seed(seed)
    made = objective.net(batch)._asdict()
    return {name: states for name, states in made.items() if name in ("l2r", "r2l", "queries")}


@pytest.mark.parametrize("name", ["flm", "ar", "prefixlm"])
def test_no_target_leaks(way: str, name: str) -> None:
    """Invariant 3: with the same random numbers no prediction moves with the word it predicts, but others do."""
    objective, batch = training("default", name)
    with torch.no_grad():
        before = outputs(objective, batch)
    assert all((before[each] - other).abs().max() > 1e-3 for each, other in outputs(objective, batch, 4).items())
    width, plan = batch.plan.text.shape[1], batch.plan
    cells = {"l2r": plan.l2r_index, "r2l": plan.r2l_index, "queries": plan.query_index}
    step = {"l2r": 1, "r2l": -1, "queries": 0}  # from a feature's cell to that of the word it predicts
    found = 0
    for row, position in [(0, 2), (1, 5), (1, 1), (2, 1), (3, 14)]:
        text = plan.text.clone()
        text[row, position] = 3 + (text[row, position] + 17) % 50
        with torch.no_grad():
            after = outputs(objective, with_text(batch, text))
        moved = {each: (after[each] - before[each]).abs().amax(1) > 1e-11 for each in before}
        assert moved["l2r"].any()
        for term in batch.terms.values():
            if term.kind == "token":
                predicts = cells[term.source][term.position] + step[term.source] == row * width + position
                found += int(predicts.sum())
                assert not moved[term.source][term.position[predicts]].any()
    assert found >= 2


@pytest.mark.parametrize(("behaviour", "name"), OBJECTIVES)
def test_gradients_are_those_of_finite_differences(way: str, behaviour: str, name: str) -> None:
    """Along a random direction of all parameters and each group of layers, in double, the same weights dropped."""
    objective, batch = training(behaviour, name)
    generator = torch.Generator().manual_seed(7)
    weights = {
        each: torch.randn(states.shape, generator=generator, dtype=torch.float64)
        for each, states in outputs(objective, batch).items()
    }

    def value() -> Tensor:
        return sum((states * weights[each]).sum() for each, states in outputs(objective, batch).items())

    named = [(each, parameter) for each, parameter in objective.net.named_parameters() if "pooler" not in each]
    gradients = torch.autograd.grad(value(), [parameter for _, parameter in named], allow_unused=True)
    for part in ("", "bottom", "top", "reconstructor", "embedding"):
        chosen = [
            (parameter, gradient, direction(each, parameter, generator))
            for (each, parameter), gradient in zip(named, gradients, strict=True)
            if each.startswith(part) and gradient is not None
        ]
        if not chosen:
            continue
        expected = sum((gradient * along).sum() for _, gradient, along in chosen).item()
        found, step = [], 1e-6
        with torch.no_grad():
            for sign in (1, -2):  # one step ahead, then one step behind
                for parameter, _, along in chosen:
                    parameter.add_(along, alpha=sign * step)
                found.append(value().item())
            for parameter, _, along in chosen:
                parameter.add_(along, alpha=step)
        slope = (found[0] - found[1]) / (2 * step)
        # Rounding of the values over the step, and the third derivative times its square.
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-5), part


def direction(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random, but 0 for what padding is embedded as: it has no gradient, though the released behaviour reads it."""
    along = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if name in ("embedding.word.weight", "embedding.position.weight"):
        along[VOCABULARY.pad_id if "word" in name else PAD_POSITION] = 0
    return along


def test_each_attention_weight_is_dropped_or_scaled(way: str) -> None:
    """A query that sees one key has a weight of 1: a head gives 0, at the dropout rate, or the value / (1 - rate)."""
    torch.manual_seed(0)
    num_rows, heads, width = 500, 2, 6
    packing = Packing(torch.arange(2 * num_rows), num_rows, 2)
    mask = torch.eye(2, dtype=torch.bool).expand(num_rows, 2, 2)
    attend = text_attention(packing, packing, mask, num_rows, RATE)
    assert isinstance(attend, RowAttention) == (way == "row by row")
    packed = torch.randn(2 * num_rows, 3 * width, dtype=torch.float64)
    by_head = attend(packed, None, heads, RATE).unflatten(1, (heads, -1))
    value = packed[:, 2 * width :].unflatten(1, (heads, -1))
    dropped = (by_head == 0).all(-1)
    # The factor is 1 / (1 - rate) exactly; both ways round it and the product, in double.
    torch.testing.assert_close(by_head[~dropped], value[~dropped] / (1 - RATE), rtol=1e-14, atol=0)
    error = math.sqrt(RATE * (1 - RATE) / dropped.numel())
    assert dropped.double().mean().item() == pytest.approx(RATE, abs=5 * error)


@pytest.mark.parametrize(("behaviour", "name"), OBJECTIVES)
def test_a_step_follows_its_seed(way: str, behaviour: str, name: str) -> None:
    """Losses and gradients are the same for the same random numbers and others for others; all are finite."""
    objective, batch = training(behaviour, name)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sums = objective(batch)
        gradients = torch.autograd.grad(sum(sums.values()), list(objective.parameters()), allow_unused=True)
        runs.append([*sums.values(), *(each for each in gradients if each is not None)])
    assert all(torch.equal(first, again) for first, again in zip(*runs[:2], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])
    assert all(torch.isfinite(each).all() for run in runs for each in run)
