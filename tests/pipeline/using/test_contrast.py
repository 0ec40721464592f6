"""What a model that contrasts texts and images gives of both for searches: what its training compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import openflm
from model.batch import Row
from pipeline.using.model import Model
from tests.rounding import TINY
from tests.tiny_runs import TOWERS, jpeg
from tests.written_run import write_run

PICTURES = [jpeg(number) for number in range(3)]
TEXTS = ["a red dog is here", "a blue cat number 3 is here again", "a green bird"]
SETTINGS = (
    TOWERS
    + """
objective: {{name: flm, itc_weight: 0.1, itc_width: 8}}
data: {{paths: ["{data}/captions"], tokenizer: "{data}/tokenizer", max_text_length: 20, fast_decode: false}}
"""
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Model:
    run = write_run(tmp_path_factory.mktemp("contrast") / "run", tiny_data, SETTINGS, spread=3.0)
    return openflm.load(run, device="cpu")


def test_products_of_embeddings_are_the_scores_of_training(model: Model) -> None:
    found = model.features(PICTURES, TEXTS)
    objective, tokenizer = model._trained.objective, model._trained.run.tokenizer
    pixels = torch.from_numpy(np.concatenate([model.pixels(data) for data in PICTURES]))[:, None]
    rows = [Row(tokenizer.encode(text, 20), number, 0) for number, text in enumerate(TEXTS)]
    batch = objective.planner(pixels, rows)
    with torch.no_grad():
        scores = objective.itc_head(*objective.pooled(objective.net(batch), batch)) * 0.07
    products = found["text_embedding"] @ found["image_embedding"].T
    assert products.dtype == np.float32 and np.ptp(products) > 0.1
    np.testing.assert_allclose(products, scores.numpy(), rtol=0, atol=TINY)
    assert np.array_equal(model.features(texts=TEXTS)["text_embedding"], found["text_embedding"])
    alone = model.features(PICTURES[:1])
    assert alone.keys() == {"tokens", "image", "image_embedding"}
    np.testing.assert_allclose(alone["image_embedding"], found["image_embedding"][:1], rtol=0, atol=TINY)
    assert {name: value.shape for name, value in model.features([]).items()}["image_embedding"] == (0, 8)
