"""Weights get into a module by one function: every name is accounted for, or nothing is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.weights.start import Rules, start_from


class Toy(nn.Module):
    """A network with a joined matrix, a position table, batch statistics and a head."""

    def __init__(self, classes: int = 3, grid: int = 2) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.qkv = nn.Linear(4, 12, bias=False)
        self.net.position_embedding = nn.Parameter(torch.zeros(1 + grid * grid, 4))
        self.net.norm = nn.BatchNorm1d(4, affine=False)
        self.net.norm.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.head = nn.Linear(4, classes)


RULES: Rules = (
    (r"net\.qkv\.weight", ("q", "k", "v")),
    (r"net\.position_embedding", ("positions",)),
    (r"(.+)", (r"\1",)),
)
NORM = [f"net.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]


def source(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {name: torch.full((4, 4), float(number)) for number, name in enumerate("qkv", start=1)}
    state |= {"positions": torch.rand(5, 4), "head.weight": torch.rand(3, 4), "head.bias": torch.rand(3)}
    state |= dict(zip(NORM, (torch.rand(4), torch.rand(4), torch.tensor(7)), strict=True)) | changes
    return {name: value for name, value in state.items() if value is not None}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_every_name_is_accounted_for() -> None:
    toy, state = Toy(classes=5, grid=3), source(extra=torch.ones(1), gone=torch.ones(1))
    before = snapshot(toy)
    found = start_from(toy, state, RULES, fresh=[r"head\..+"], dropped=[r"head\..+", "extra|gone"])
    assert {*found.loaded} == {"net.qkv.weight", "net.position_embedding", *NORM}
    assert found.resized == ["net.position_embedding"] and found.fresh == ["head.weight", "head.bias"]
    assert found.dropped == ["extra", "gone", "head.bias", "head.weight"]
    assert {*found.loaded, *found.fresh} == {*toy.state_dict()}
    assert toy.net.qkv.weight[:, 0].tolist() == [1.0] * 4 + [2.0] * 4 + [3.0] * 4
    assert torch.equal(toy.net.position_embedding[0], state["positions"][0])
    assert toy.net.norm.num_batches_tracked == 7 and torch.equal(toy.net.norm.running_var, state[NORM[1]])
    assert torch.equal(toy.head.weight, before["head.weight"])
    assert str(found) == "5 loaded, 1 resized, 2 fresh, 4 dropped"


def test_a_head_that_fits_is_loaded_though_it_might_be_fresh() -> None:
    toy, state = Toy(), source()
    found = start_from(toy, state, RULES, fresh=[r"head\..+"], dropped=[r"head\..+"])
    assert (found.fresh, found.dropped, found.resized) == ([], [], [])
    assert torch.equal(toy.head.weight, state["head.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.bias": None}, r"model\.weights X: weights lack head\.bias, needed for head\.bias; are they of"),
        ({"k": None}, r"weights lack k, needed for net\.qkv\.weight;"),
        ({NORM[0]: None}, r"weights lack net\.norm\.running_mean"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, "the model has no place for a, b; is it of"),
        ({"head.bias": torch.ones(4)}, r"head\.bias has shape \(4,\), the model's head\.bias \(3,\);"),
        (
            {"head.bias": torch.ones(4), "a": torch.ones(1), "k": None},
            r"shape \(4,\).*lack k,.*no place for a;",
        ),
        ({"k": torch.ones(3, 4), "v": torch.ones(5, 4)}, r"k has shape \(3, 4\), q \(4, 4\): expected parts of net"),
        ({name: torch.tensor(1.0) for name in "qkv"}, r"q has shape \(\), q \(\): expected"),
        ({"positions": torch.ones(6, 4)}, "position table has 6 rows, expected 1 . a square"),
        (
            {"positions": torch.ones(5, 3)},
            r"positions has shape \(5, 3\), the model's net\.pos.* \(5, 4\)",
        ),
    ],
)
def test_whatever_is_not_allowed_is_named_and_nothing_is_written(change: dict, message: str) -> None:
    toy = Toy()
    before = snapshot(toy)
    with pytest.raises(ValueError, match=message) as error:
        start_from(toy, source(**change), RULES, "model.weights X")
    assert str(error.value).startswith("model.weights X: ") and "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in toy.state_dict().items())


def test_a_further_image_gets_the_type_of_the_last_one() -> None:
    toy, types = nn.Module(), torch.arange(4.0).view(2, 2)
    toy.net = nn.Module()
    toy.net.type_embedding = nn.Embedding(3, 2)
    assert start_from(toy, {"net.type_embedding.weight": types}).resized == ["net.type_embedding.weight"]
    assert toy.net.type_embedding.weight.tolist() == [[0, 1], [2, 3], [2, 3]]
