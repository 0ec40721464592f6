"""Weights files as trainers write them: with prefixes, wrapped, or no weights at all; the right tower for a tag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.config import VisionConfig
from model.torchvision_shim import ensure_torchvision
from model.vision.clip import IMAGE_MEAN, IMAGE_STD, VisionTower
from pipeline.weights.files import read_state_dict
from pipeline.weights.sources import load_vision
from tests.rounding import rounding

PLAIN = {"visual.conv1.weight": torch.ones(2), "logit_scale": torch.tensor(3.0)}


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        {f"module.{name}": value for name, value in PLAIN.items()},
        {f"module._orig_mod.module.{name}": value for name, value in PLAIN.items()},
        {"visual._orig_mod.conv1.weight": PLAIN["visual.conv1.weight"], "logit_scale": PLAIN["logit_scale"]},
        {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in PLAIN.items()}, "optimizer": {"a": [1]}},
        {"model": PLAIN, "args": None},
        {"model": {"state_dict": PLAIN}},
        {**PLAIN, "epoch": 3},
    ],
)
def test_the_model_s_own_names_come_out(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "weights.pt")
    found = read_state_dict(tmp_path / "weights.pt")
    assert found.keys() == PLAIN.keys() and all(torch.equal(found[name], value) for name, value in PLAIN.items())
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        save_file(content, tmp_path / "weights.safetensors")
        assert read_state_dict(tmp_path / "weights.safetensors").keys() == PLAIN.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds a NoneType, expected tensors by name"),
        ([torch.ones(1)], "holds a list"),
        ({"state_dict": None}, "holds a NoneType"),
        ({"epoch": 3}, "holds no tensors"),
        ({}, "holds no tensors"),
        ({3: torch.ones(1)}, "holds a tensor named 3"),
        ({"a": torch.ones(1), "module.a": torch.ones(1)}, "holds a twice, with and without a trainer's prefix"),
    ],
)
def test_what_holds_no_weights_is_refused_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message) as error:
        read_state_dict(tmp_path / "weights.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text_half", [True, False])
def test_transformers_clip_gives_the_same_tokens(tmp_path: Path, text_half: bool) -> None:
    """The tower computes what transformers' computes, all blocks kept, a whole CLIP or its image half in the file."""
    ensure_torchvision()
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=16, hidden_act="quick_gelu")
    if text_half:
        text = transformers.CLIPTextConfig(**sizes, vocab_size=20, max_position_embeddings=8)
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
        ).eval()
        theirs = model.vision_model
    else:
        model = transformers.CLIPVisionModel(vision).eval()
        theirs = getattr(model, "vision_model", model)
    state = model.state_dict()
    if not text_half and not any(name.startswith("vision_model.") for name in state):
        state = {f"vision_model.{name}": value for name, value in state.items()}  # as its files are named
    save_file(state, tmp_path / "model.safetensors")
    config = VisionConfig(name=None, pretrained=str(tmp_path / "model.safetensors"), image_size=32, patch_size=16)
    config.width, config.layers, config.head_width, config.drop_last_block = 32, 2, 16, False
    tower = VisionTower(config).eval()
    found = load_vision(tower, config)
    assert {*found.loaded} == {name for name, _ in tower.named_parameters()} and found.fresh == []
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    with torch.no_grad():
        tokens = theirs(pixel_values=(pixels.float() / 255 - mean) / std).last_hidden_state
        tolerance = rounding(3 * 16 * 16, *[32 * 4 + 64 + 5] * 2)  # patches, then two layers
        torch.testing.assert_close(tower(pixels), theirs.post_layernorm(tokens), rtol=tolerance, atol=tolerance)


def test_a_tag_of_another_activation_is_refused() -> None:
    """Names and shapes would fit; the hub is not asked."""
    config = VisionConfig(name="ViT-B-32", pretrained="openai", quick_gelu=False)
    with torch.device("meta"):
        tower = VisionTower(config)
    with pytest.raises(
        ValueError, match="openai's weights want QuickGELU, which ViT-B-32 has not; .*name ViT-B-32-quickgelu"
    ):
        load_vision(tower, config)
