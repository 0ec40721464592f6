"""Parts of an exported folder are read by the libraries they come from, and compute the same there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from model.config import ModelConfig, VisionConfig
from model.torchvision_shim import ensure_torchvision
from model.vision.tower import build_tower
from pipeline.export import main
from pipeline.exporting.parts import write_tower
from pipeline.weights.sources import load_vision
from tests.model.vision.test_tower import hf_folder, hf_vit_settings
from tests.pipeline.exporting.exported_runs import loaded, make_data, make_run, pixels
from tests.rounding import rounding

ensure_torchvision()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of EVLGen with adapters (run_evlgen) and its export (out_evlgen)."""
    root = tmp_path_factory.mktemp("parts")
    make_data(root)
    assert main([str(make_run("evlgen", root)), str(root / "out_evlgen")]) == 0
    return root


@pytest.mark.slow
def test_transformers_reads_the_language_model_and_peft_its_adapter(folder: Path) -> None:
    """Equal logits of the model that was frozen; with the adapter those of the trained one, to rounding."""
    import peft
    import transformers

    out, language = folder / "out_evlgen", loaded(folder / "run_evlgen")[2].net.language
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "data" / "llm", dtype=torch.float32).eval()
    found = transformers.AutoModelForCausalLM.from_pretrained(out / "language_model", dtype=torch.float32).eval()
    ids = torch.arange(1, 13).view(1, -1)
    with torch.no_grad():
        assert torch.equal(found(ids).logits, plain(ids).logits)
        adapted = peft.PeftModel.from_pretrained(found, out / "adapter").eval()
        ours, theirs = language.llm(ids).logits, adapted(ids).logits
    assert (ours - plain(ids).logits).abs().max() > 1e-3  # the adapter does something
    assert (ours - theirs).abs().max() <= rounding(*[32 * 6 + 64 + 12] * 2, 32) * float(ours.abs().max())


@pytest.mark.slow
def test_open_clip_reads_a_clip_tower(folder: Path) -> None:
    """Names are those of its image encoder, but for the projection behind it; tokens are equal to rounding."""
    import open_clip

    sizes = dict(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=4.0, output_dim=8)
    theirs = open_clip.transformer.VisionTransformer(**sizes, act_layer=open_clip.transformer.QuickGELU).eval()
    state = load_file(folder / "out_evlgen" / "vision_tower" / "model.safetensors")
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["proj"], [])
    tower, images = loaded(folder / "run_evlgen")[2].net.vision, pixels(2)[:, 0]
    settings = json.loads((folder / "out_evlgen" / "preprocessor_config.json").read_text())
    mean, deviation = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    pooled: dict[str, torch.Tensor] = {}
    theirs.ln_post.register_forward_hook(lambda module, inputs, output: pooled.update(tokens=output))
    with torch.no_grad():
        ours = tower(images)
        theirs((images.float() / 255 - mean) / deviation)
    tokens = pooled["tokens"]
    assert (ours - tokens).abs().max() <= rounding(192, *[32 * 6 + 128 + 17] * 2) * float(ours.abs().max())


@pytest.mark.slow
def test_timm_reads_its_tower(tmp_path: Path) -> None:
    import timm

    model, tower = written_tower(VisionConfig(name="timm/test_vit", image_size=96), tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'vision_tower'}", pretrained=True).eval()
    images = pixels(2, 96)[:, 0]
    mean, deviation = (torch.tensor(theirs.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        ours, found = tower(images), theirs.forward_features((images.float() / 255 - mean) / deviation)
    assert (ours - found).abs().max() <= rounding(768, *[64 * 6 + 256 + 37] * 12) * float(ours.abs().max())


@pytest.mark.slow
def test_transformers_reads_its_tower(tmp_path: Path) -> None:
    import transformers

    hf_folder(tmp_path / "theirs", hf_vit_settings())
    _, tower = written_tower(VisionConfig(name=f"hf/{tmp_path / 'theirs'}", image_size=32), tmp_path)
    found = transformers.AutoModel.from_pretrained(tmp_path / "vision_tower").eval()
    state = found.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in tower.backbone.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "eva", "timm/test_efficientnet"])
def test_every_tower_comes_back_bit_for_bit(tmp_path: Path, name: str | None) -> None:
    """The names of its library, and what its parts are called there, are read by the reader of published weights."""
    sizes = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16)
    vision = VisionConfig(name=name, **sizes)
    if name == "eva":
        vision = VisionConfig(name=None, layout="eva", quick_gelu=False, **sizes)
    model, tower = written_tower(vision, tmp_path)
    again = build_tower(vision)
    file = tmp_path / "vision_tower" / "model.safetensors"
    load_vision(again, VisionConfig(**{**vars(vision), "pretrained": str(file)}))
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in tower.state_dict().items())
    if name == "eva":
        assert "blocks.0.attn.q_bias" in load_file(file)


def written_tower(vision: VisionConfig, folder: Path) -> tuple[ModelConfig, nn.Module]:
    """A random tower, written to ``folder``/vision_tower."""
    torch.manual_seed(0)
    model = ModelConfig(vision=vision)
    tower = build_tower(vision).eval()
    write_tower(tower, model, folder, torch.float32)
    return model, tower


@pytest.mark.slow
def test_accelerate_dispatches_the_file(folder: Path) -> None:
    """Which asks for the metadata's format, and for every name."""
    import accelerate

    expected = loaded(folder / "run_evlgen")[2]
    with torch.no_grad():
        connector = loaded(folder / "run_evlgen")[2].net.connector
        for value in connector.parameters():
            value.zero_()
    holder = nn.Module()
    holder.net = nn.Module()
    holder.net.connector = connector
    found = accelerate.load_checkpoint_and_dispatch(holder, str(folder / "out_evlgen" / "model.safetensors"))
    state = expected.net.connector.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.net.connector.state_dict().items())
