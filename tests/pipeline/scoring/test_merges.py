"""Pictures of merges: patches of one token have one colour, that of all of them."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from model.connectors.tomeformer import TomeFormer
from model.merge.apply import membership
from model.vision.tower import grid_of
from pipeline.scoring import merges
from pipeline.scoring.merges import merge_pictures
from tests.model.test_evlgen import small_model


def test_patches_of_one_token_have_one_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against groups worked out by hand, on the pixels before they become a JPEG."""
    model = small_model("llama", num_tokens=3, layers=3)
    net, grid = model.net, grid_of(model.net.vision)
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    drawn: list[torch.Tensor] = []
    kept = merges.thumbnail
    monkeypatch.setattr(merges, "thumbnail", lambda pixels: drawn.append(pixels) or kept(pixels))
    found = merge_pictures(net, image, grid)
    assert [(one["layer"], one["tokens"]) for one in found] == [(1, 5), (2, 4), (3, 3)]
    assert isinstance(net.connector.body, TomeFormer)
    with torch.no_grad():
        plans = net.connector.trace(net.features(image[None, None])).plans
    for layer, pixels in enumerate(drawn):
        groups = membership(plans[: layer + 1], 1, 5)[0, 1:].tolist()
        corners = [(8 * (n // 2), 8 * (n % 2)) for n in range(4)]
        colours = [image[:, y : y + 8, x : x + 8].float().mean((1, 2)) for y, x in corners]
        for group, (y, x) in zip(groups, corners, strict=True):
            together = torch.stack([colour for colour, other in zip(colours, groups) if other == group])
            assert (pixels[:, y, x].float() - together.mean(0)).abs().max() <= 0.5 + 1e-3
    picture = Image.open(io.BytesIO(base64.b64decode(found[0]["thumbnail"])))
    assert picture.size == (16, 16)


def test_other_networks_have_none() -> None:
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    pooling = small_model("llama", name="pooling").net
    assert merge_pictures(pooling, image, grid_of(pooling.vision)) == []
    assert merge_pictures(small_model("llama").net, image, None) == []
