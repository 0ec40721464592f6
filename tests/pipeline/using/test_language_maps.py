"""Where words of EVLGen looked: attention by transformers' own report, patches by what the connector computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from model.batch import Row
from model.language_attention import language_attention, token_areas
from model.torchvision_shim import ensure_torchvision
from model.vision.tower import grid_of
from pipeline.using.model import Model
from tests.pipeline.data.test_reader import jpeg
from tests.rounding import rounding

Loader = Callable[[str], Model]
TEXT = "a red dog is here"
ROUNDING = 10 * rounding(192, *[32 * 6 + 64 + 60] * 4)  # as in test_model.py, of the language model's 2 layers too


def pixels_of(model: Model, number: int = 1) -> torch.Tensor:
    return torch.from_numpy(model.pixels(jpeg(number)))[None]


@pytest.mark.parametrize("kind", ["evlgen_tomeformer", "evlgen_pooling"])
def test_attention_is_what_transformers_reports(model_of: Loader, kind: str) -> None:
    ensure_torchvision()
    import transformers

    model = model_of(kind)
    objective, config = model._trained.objective, model._trained.run.config
    net, form = objective.net, objective.net.form
    words = model._trained.run.tokenizer.encode(TEXT, 99)[1:-1]
    ids = [*form.begin, *words, *form.end]
    batch = objective.planner(pixels_of(model), [Row(ids, 0, 0, "pair")])
    before = net.language.llm.config._attn_implementation
    found = language_attention(net, batch)
    other = transformers.AutoModelForCausalLM.from_pretrained(config.model.language.name, attn_implementation="eager")
    with torch.no_grad():
        prefix = net.prefix(net.encode(pixels_of(model)))
        inputs = torch.cat([prefix, net.language.embed(torch.tensor([ids]))], 1)
        reported = other.base_model(inputs_embeds=inputs, output_attentions=True).attentions
    expected = torch.stack([one[0].mean(0) for one in reported]).mean(0)
    start, first = prefix.shape[1], len(net.before)
    assert torch.allclose(found, expected[start - 1 : start - 1 + len(ids), first:start], rtol=ROUNDING, atol=ROUNDING)
    assert net.language.llm.config._attn_implementation == before != "eager"
    caption = model.caption(jpeg(1))
    model.attention(jpeg(1), TEXT)
    assert model.caption(jpeg(1)) == caption


@pytest.mark.parametrize("kind", ["evlgen_tome", "evlgen_pooling", "evlgen_pixel_shuffle"])
def test_areas_are_the_patches_that_the_connector_averages(model_of: Loader, kind: str) -> None:
    model = model_of(kind)
    net, pixels = model._trained.objective.net, pixels_of(model)
    connector, grid = net.connector, grid_of(net.vision)
    areas = token_areas(net, pixels, grid)
    with torch.no_grad():
        tokens = connector.norm(net.features(pixels))
        if kind == "evlgen_tome":
            made = connector.regroup(tokens, connector.merges, protect_first=True).tokens[0]
        else:
            made = connector.regroup(tokens)[0].unflatten(1, (tokens.shape[2], -1)).mean(2)
    patches = areas.sum(1) > 0.5  # all but the class token
    assert int(patches.sum()) == len(made) - (kind == "evlgen_tome")
    expected = areas[patches] @ tokens[0, grid.leading :]
    assert torch.allclose(made[patches], expected, rtol=ROUNDING, atol=ROUNDING)


def test_areas_are_the_groups_that_are_merged(model_of: Loader) -> None:
    model = model_of("evlgen_tomeformer")
    net = model._trained.objective.net
    areas = token_areas(net, pixels_of(model), grid_of(net.vision)).numpy()
    groups = model.merges(jpeg(1)).ravel()
    assert np.array_equal(areas.argmax(0), groups) and ((areas > 0).sum(0) == 1).all()
    for number in set(groups.tolist()):
        assert np.allclose(areas[number], (groups == number) / (groups == number).sum())


@pytest.mark.parametrize("kind", ["evlgen_tomeformer", "evlgen_tome", "evlgen_pooling", "evlgen_pixel_shuffle"])
def test_words_get_maps_of_the_grid(model_of: Loader, kind: str) -> None:
    words, maps = model_of(kind).attention(jpeg(1), TEXT)
    assert "".join(words).replace(" ", "") == TEXT.replace(" ", "")
    assert maps.shape == (len(words), 4, 4) and (maps >= 0).all()
    assert (maps.sum((1, 2)) > 0).all() and (maps.sum((1, 2)) <= 1 + ROUNDING).all()


@pytest.mark.parametrize("kind", ["evlgen_qformer", "evlgen_perceiver"])
def test_queries_stand_for_no_patches(model_of: Loader, kind: str) -> None:
    with pytest.raises(ValueError, match="queries of model.connector.name .* stand for no patches"):
        model_of(kind).attention(jpeg(1), TEXT)
