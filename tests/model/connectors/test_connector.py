"""All connectors: tokens of any tower become as many tokens of a language model as were asked for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.config import ConnectorConfig
from model.connectors.connector import Connector
from model.connectors.regroup import PixelShuffle, Pooling
from model.connectors.tome import TokenMerging
from model.merge.apply import membership, merge_mean
from model.merge.schedule import merges_to_budget, tokens_after
from model.vision.tower import Grid
from tests.rounding import DOUBLE

WIDTH, LANGUAGE_WIDTH, GRID = 24, 20, Grid(4, 6, 1)
NAMES = ("tomeformer", "tome", "qformer", "perceiver", "pooling", "pixel_shuffle")


def connector(grid: Grid | None = GRID, num_image_tokens: int = 25, **options: Any) -> Connector:
    torch.manual_seed(0)
    small = dict(num_tokens=6, width=16, heads=2, ffn_width=32, layers=3, max_positions=32)
    return Connector(ConnectorConfig(**small | options), num_image_tokens, WIDTH, grid, LANGUAGE_WIDTH)


@pytest.mark.parametrize("name", NAMES)
def test_every_part_is_trained(name: str) -> None:
    """As many tokens as asked for, a gradient for each parameter; images do not depend on each other."""
    model = connector(name=name).train()
    images = torch.randn(3, 25, WIDTH)
    tokens = model(images)
    assert tokens.shape == (3, 6, LANGUAGE_WIDTH) and model.num_tokens == 6
    tokens.square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()  # a TomeFormer's layers begin with adding nothing
    model.zero_grad()
    model(images).square().sum().backward()
    unused = {
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    }
    assert not unused
    model.eval()
    assert not torch.equal(model(images)[0], model(images)[1])
    model, images = model.double(), images.double()
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=0, atol=DOUBLE)


@pytest.mark.parametrize("name", NAMES)
def test_macs_are_those_that_are_run(name: str) -> None:
    model = connector(name=name).eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others it does not count on a CPU
        model(torch.randn(1, 25, WIDTH))
    counted = counter.get_total_flops() // 2
    if name == "tomeformer":  # and what merging costs: similarities, sums of what is merged
        assert 0 < counted - model.macs() < 0.1 * counted
    elif name == "tome":  # similarities, at each round of all tokens at even places to those at odd ones
        left = [25, *tokens_after(25, model.merges)]
        similarities = sum((before + 1) // 2 * (before // 2) * WIDTH for before in left[:-1])
        sums = sum(after * (before - after) * (WIDTH + 3) for before, after in itertools.pairwise(left))
        assert counted == model.macs() + similarities + sums
    else:
        assert counted == model.macs()


def test_a_tomeformer_of_random_weights_begins_as_merging() -> None:
    """What it adds is nothing; means of tokens, normalised, are all that is left of an image."""
    model = connector(merging="plain").eval()
    images = torch.randn(2, 25, WIDTH)
    body, merged = model.body, model.trace(images)
    tokens = body.norm(model.input(model.norm(images)) + body.position.weight[:25] + body.token_type)
    for layer, plan in zip(body.layers, merged.plans, strict=True):
        tokens = layer.ffn.residual.norm(merge_mean(layer.residual.norm(tokens), plan))
    torch.testing.assert_close(merged.tokens, tokens)


def test_a_tomeformer_serves_any_number_of_tokens() -> None:
    model = connector(fewest_tokens=5, num_tokens=20).eval()
    images = torch.randn(2, 25, WIDTH)
    assert [model(images, number).shape[1] for number in range(5, 21)] == list(range(5, 21))
    trace = model.trace(images, 7)
    assert trace.sizes.sum(1).tolist() == [25.0, 25.0] and trace.tokens.shape[1] == 7
    assert (trace.sizes[:, 0] == 1).all(), "the class token stays alone"
    assert connector(merges_per_layer=4).num_tokens == 25 - 3 * 4
    assert connector(merges_per_layer=[5, 0, 2]).merges == (5, 0, 2)
    assert connector(merges_per_layer=4, merges_slope=-1).merges == (8, 4, 0)
    assert connector(merges_per_layer=4, merges_slope=1).merges == (0, 4, 8)
    assert connector(Grid(5, 5, 0)).eval().trace(images).sizes[:, 0].min() >= 1, "a tower without a class token"


@pytest.mark.parametrize("weighted", [True, False])
def test_merged_tokens_are_means_in_the_order_of_the_image(weighted: bool) -> None:
    """Of each group of tokens, as the plans' membership tells them; the groups by the mean place of their members."""
    tokens = torch.randn(2, 25, 5, dtype=torch.float64)
    merges = merges_to_budget(25, 3, 6)
    merged = TokenMerging(weighted)(tokens, merges, protect_first=True)
    groups = membership(merged.plans, 2, 25)
    for image in range(2):
        members = [(groups[image] == number).nonzero()[:, 0] for number in range(6)]
        members.sort(key=lambda group: float(group.double().mean()))
        assert members[0].tolist() == [0], "the class token stays alone"
        if weighted:
            expected = torch.stack([tokens[image, group].mean(0) for group in members])
            torch.testing.assert_close(merged.tokens[image], expected, rtol=0, atol=1e-6)  # means in fp32
            assert merged.sizes[image].tolist() == [len(group) for group in members]
    if not weighted:
        steps = tokens
        for plan in merged.plans:
            steps = merge_mean(steps, plan)
        assert merged.sizes is None
        torch.testing.assert_close(merged.tokens.sum(1), steps.sum(1), rtol=0, atol=DOUBLE)


def test_pooling_is_the_mean_of_areas() -> None:
    """Of a grid of 4 x 6: two rows and three columns of areas, each of 2 x 2 cells."""
    tokens = torch.randn(2, 25, 5)
    cells = tokens[:, 1:].reshape(2, 4, 6, 5)
    areas = [
        cells[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2)) for i, j in itertools.product(range(2), range(3))
    ]
    torch.testing.assert_close(Pooling(GRID, 6)(tokens), torch.stack(areas, 1))


def test_pixel_shuffle_keeps_every_number() -> None:
    tokens = torch.randn(2, 25, 5)
    model = PixelShuffle(GRID, 6)
    stacked = model(tokens)
    assert stacked.shape == (2, 6, 20) and model.width(5) == 20
    cells = tokens[:, 1:].reshape(2, 4, 6, 5)
    for number, (i, j) in enumerate(itertools.product(range(2), range(3))):
        square = cells[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1)
        assert torch.equal(stacked[:, number].sort().values, square.sort().values)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"width": 15}, "width 15 is not a multiple of heads 2"),
        ({"num_tokens": 0}, "num_tokens is 0, expected 1 or more"),
        ({"num_tokens": 26}, "num_tokens: 26 tokens can't remain of 25 after 3 layers; 4 can at least"),
        ({"num_tokens": 3}, "num_tokens: 3 tokens can't remain of 25 after 3 layers; 4 can at least"),
        ({"fewest_tokens": 3}, "num_tokens: 3 tokens can't remain of 25"),
        ({"fewest_tokens": 7}, "fewest_tokens is 7, expected 1 to num_tokens"),
        ({"merges_per_layer": -1}, "merges_per_layer is -1, expected 0 or more"),
        ({"merges_per_layer": [4, -1, 2]}, r"merges_per_layer is \[4, -1, 2\], expected 0 or more"),
        ({"merges_per_layer": [4, 2]}, r"merges_per_layer is \[4, 2\], expected a number for each of 3 layers"),
        ({"merges_per_layer": []}, r"merges_per_layer is \[\], expected a number for each of 3 layers"),
        ({"layers": 5, "merges_per_layer": 25}, "merges_per_layer 25 merges all 25 tokens .* expected at most 7$"),
        ({"layers": 5, "merges_per_layer": 25, "merges_slope": -0.5}, "merges all 25 tokens .* expected at most 5$"),
        ({"layers": 5, "merges_per_layer": [25] * 5}, "merges all 25 tokens of an image into one; expected smaller"),
        ({"merges_per_layer": 4, "merges_slope": 1.5}, "merges_slope is 1.5, expected -1 to 1"),
        ({"merges_per_layer": [4, 4, 4], "merges_slope": 1}, r"merges_slope 1 needs one number .* found \[4, 4, 4\]"),
        ({"merges_slope": -0.5}, "merges_slope -0.5 needs one number in merges_per_layer; found None"),
        ({"merges_per_layer": 2, "fewest_tokens": 5}, "fewest_tokens has no effect beside merges_per_layer"),
        (
            {"name": "qformer", "merges_per_layer": 2},
            "merges_per_layer is of tomeformer and tome; leave it null",
        ),
        ({"max_positions": 24}, "max_positions 24 is less than the tower's 25 tokens"),
        ({"name": "pooling", "num_tokens": 7}, r"pooling can't make 7 tokens of a grid of 4x6; set .* to 6 or 8 or 9"),
        ({"name": "pixel_shuffle", "num_tokens": 5}, r"can't make 5 tokens of a grid of 4x6; set .* to 6 or 24"),
        ({"name": "pooling", "grid": None}, "name pooling needs a tower whose grid is known"),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=f"^model.connector.*{error}"):
        connector(**options)
