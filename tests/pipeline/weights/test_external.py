"""Weights of towers of other libraries: strict by name, from any wrapping, or nothing is written."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.config import VisionConfig
from model.torchvision_shim import ensure_torchvision
from model.vision.clip import VisionTower
from model.vision.external import ExternalTower
from model.vision.tower import build_tower
from pipeline.weights.external import load_external, published_files
from pipeline.weights.sources import load_vision
from tests.model.vision.test_tower import hf_folder, hf_vit_settings
from tests.tiny_flm import tiny_config

ensure_torchvision()


def timm_weights(name: str = "test_vit", **changes) -> dict[str, torch.Tensor]:
    import timm

    torch.manual_seed(7)
    return timm.create_model(name, **changes).state_dict()


def config_of(file: Path | str, name: str = "timm/test_vit", image_size: int = 160) -> VisionConfig:
    return VisionConfig(name=name, pretrained=str(file), image_size=image_size)


def saved(folder: Path, state: dict, name: str = "weights.pt") -> Path:
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    return folder / name


def holds(tower: ExternalTower, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in tower.backbone.state_dict().items())


WRAPPINGS = {
    "plain": lambda state: state,
    "module": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "both": lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "part": lambda state: {f"encoder.image.{n}": v for n, v in state.items()} | {"encoder.text.bias": torch.zeros(1)},
}


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_local_file_in_any_wrapping(tmp_path: Path, wrapping: str) -> None:
    state = timm_weights()
    config = config_of(saved(tmp_path, WRAPPINGS[wrapping](state)))
    tower = build_tower(config)
    assert not holds(tower, state)
    loaded = load_external(tower, config)
    assert holds(tower, state) and (loaded.resized, loaded.fresh) == ([], [])
    assert set(loaded.loaded) == set(state) - {"head.weight", "head.bias"}
    beside = ["encoder.text.bias"] if wrapping == "part" else []
    assert loaded.dropped == ["head.bias", "head.weight", *beside]


@pytest.mark.parametrize("wrapping", [name for name in WRAPPINGS if name != "part"])
def test_a_clip_in_any_wrapping(tmp_path: Path, wrapping: str) -> None:
    """The CLIP tower of this package, from a whole CLIP or from the image encoder alone."""
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    theirs = VisionTransformer(32, 16, 32, layers=3, heads=2, mlp_ratio=4.0, output_dim=8)
    config = tiny_config().vision
    for prefix in ("visual.", ""):
        state = {prefix + name: value for name, value in theirs.state_dict().items()}
        config.pretrained = str(saved(tmp_path, WRAPPINGS[wrapping](state)))
        tower = VisionTower(config)
        load_vision(tower, config)
        assert torch.equal(tower.patch_embedding.weight, theirs.conv1.weight)
        assert torch.equal(tower.blocks[1].qkv.weight, theirs.transformer.resblocks[1].attn.in_proj_weight)


def test_position_tables_are_resized(tmp_path: Path) -> None:
    """Bicubically, the class row kept; to the same function of position, here a constant."""
    state = timm_weights()
    state["pos_embed"] = torch.cat([torch.full((1, 1, 64), 3.0), torch.full((1, 100, 64), 5.0)], dim=1)
    config = config_of(saved(tmp_path, state, "weights.safetensors"), image_size=64)
    tower = build_tower(config)
    assert load_external(tower, config).resized == ["pos_embed"]
    expected = torch.cat([torch.full((1, 1, 64), 3.0), torch.full((1, 16, 64), 5.0)], dim=1)
    torch.testing.assert_close(tower.backbone.pos_embed, expected)


@pytest.mark.slow
def test_a_hugging_face_folder_with_a_classifier(tmp_path: Path) -> None:
    import transformers

    folder = hf_folder(tmp_path, hf_vit_settings())
    torch.manual_seed(1)
    theirs = transformers.ViTForImageClassification(hf_vit_settings())
    theirs.save_pretrained(folder)
    for pretrained in (folder, folder / "model.safetensors"):
        config = config_of(pretrained, f"hf/{folder}", 32)
        tower = build_tower(config)
        loaded = load_external(tower, config)
        assert holds(tower, theirs.vit.state_dict())
        assert loaded.dropped == ["classifier.bias", "classifier.weight"] and loaded.fresh == []
    shallow = hf_folder(tmp_path / "shallow", hf_vit_settings(num_hidden_layers=1))
    config = config_of(folder, f"hf/{shallow}", 32)
    with pytest.raises(ValueError, match="the model has no place for layers.1."):
        load_external(build_tower(config), config)


def deeper(state: dict) -> dict:
    return state | {
        name.replace("blocks.5.", "blocks.9."): value for name, value in state.items() if "blocks.5." in name
    }


REFUSED = {
    "deeper": (deeper, "the model has no place for blocks.9.attn.proj.bias, .* and 9 more"),
    "shallower": (
        lambda s: {n: v for n, v in s.items() if "blocks.5." not in n},
        "weights lack blocks.5.norm1.weight, needed for",
    ),
    "wider": (
        lambda s: s | {"norm.weight": torch.zeros(65)},
        r"norm.weight has shape \(65,\), the model's norm.weight \(64,\)",
    ),
    "other": (lambda s: {"encoder.bias": torch.zeros(2)}, "has no tensor .*found encoder.bias"),
    "empty": (lambda s: {"epoch": 3}, "holds no tensors"),
    "list": (lambda s: [1, 2], "holds a list, expected tensors by name"),
    "twice": (lambda s: {f"{part}.{n}": v for n, v in s.items() for part in ("ema", "net")}, "2 times, below 'ema.'"),
    "lukemelas": (lambda s: {"_conv_stem.weight": torch.zeros(2)}, "for model.vision.name timm/tf_efficientnet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit_change_nothing(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    config = config_of(saved(tmp_path, change(timm_weights())))
    tower = build_tower(config)
    before = copy.deepcopy(tower.state_dict())
    with pytest.raises(ValueError, match=f"model.vision.pretrained .*{message}") as error:
        load_vision(tower, config)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())


def efficientnet_pytorch_keys(num_blocks: int) -> list[str]:
    """The names of lukemelas' EfficientNet-Lite in their order, as its constructor makes them."""
    norm = [f"{{}}.{kind}" for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    keys = ["_conv_stem.weight", *(one.format("_bn0") for one in norm)]
    for number in range(num_blocks):
        parts = [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        for conv, bn in [("_expand_conv", "_bn0"), *parts] if number else parts:  # the first block does not widen
            block = f"_blocks.{number}."
            keys += [f"{block}{conv}.weight", *(block + one.format(bn) for one in norm)]
    return [*keys, "_conv_head.weight", *(one.format("_bn1") for one in norm), "_fc.weight", "_fc.bias"]


@pytest.mark.slow
def test_weights_of_efficientnet_pytorch(tmp_path: Path) -> None:
    """By name; the reference goes by order, in which both libraries make the same layers."""
    theirs = timm_weights("tf_efficientnet_lite0")
    generator = torch.Generator().manual_seed(0)
    for value in theirs.values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator))
    state = dict(zip(efficientnet_pytorch_keys(16), theirs.values(), strict=True))
    config = config_of(saved(tmp_path, state), "timm/tf_efficientnet_lite0", 64)
    tower = build_tower(config)
    loaded = load_external(tower, config)
    assert holds(tower, theirs) and len(loaded.loaded) == 294
    assert (loaded.resized, loaded.fresh, loaded.dropped) == ([], [], ["classifier.bias", "classifier.weight"])

    config.stage = 2  # of a whole file the first part
    tower = build_tower(config)
    loaded = load_external(tower, config)
    assert holds(tower, theirs) and (loaded.resized, loaded.fresh) == ([], [])
    assert len(loaded.loaded) + len(loaded.dropped) == len(theirs)
    config.stage = None
    tower = build_tower(config)

    saved(tmp_path, {name: value for name, value in state.items() if "_blocks.15." not in name})
    with pytest.raises(ValueError, match="has 15 blocks, the tower 16"):
        load_external(tower, config)
    saved(tmp_path, state | {"_blocks.3._extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="has _blocks.3._extra.weight, which no EfficientNet of timm has"):
        load_external(tower, config)


@pytest.mark.parametrize(
    ("name", "pretrained", "expected"),
    [
        ("timm/resnet18", "auto", ("timm/resnet18.a1_in1k", "model.safetensors")),
        ("timm/resnet18", "fb_swsl_ig1b_ft_in1k", ("timm/resnet18.fb_swsl_ig1b_ft_in1k", "model.safetensors")),
        ("timm/resnet18.tv_in1k", "auto", ("timm/resnet18.tv_in1k", "model.safetensors")),
        ("open_clip/RN50", "openai", ("timm/resnet50_clip.openai", "open_clip_model.safetensors")),
        ("hf/google/vit-base", "google/vit-base", ("google/vit-base", "config.json", "model.safetensors")),
        ("hf/google/vit-base", "auto", ("google/vit-base", "config.json", "model.safetensors")),
    ],
)
def test_tags_name_files_of_the_hub(name: str, pretrained: str, expected: tuple[str, ...]) -> None:
    assert published_files(config_of(pretrained, name)) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet18", "neither a file nor a tag of timm's resnet18"),
        ("open_clip/RN50", "neither a file nor a tag of open_clip's RN50 on the hub \\(openai, yfcc15m, cc12m\\)"),
    ],
)
def test_tags_that_do_not_exist(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        published_files(config_of("nothing", name))


def test_a_tag_is_fetched_from_the_hub(tmp_path: Path, monkeypatch) -> None:
    """Also what is said where the hub can't be reached."""
    import huggingface_hub

    state = timm_weights()
    file = saved(tmp_path, state, "weights.safetensors")
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names: asked.append(names) or str(file))
    config = config_of("r160_in1k")
    tower = build_tower(config)
    load_vision(tower, config)
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")] and holds(tower, state)

    def unreachable(*_):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(
        ValueError, match=r"model.vision.pretrained r160_in1k: .* can't be had from the hub \(no route\)"
    ):
        load_vision(tower, config)


@pytest.mark.parametrize(
    ("name", "tag", "message"),
    [
        ("ViT-B-32", "openai", "openai's weights want QuickGELU, .* use model.vision.name ViT-B-32-quickgelu"),
        ("open_clip/ViT-B-32", "openai", "use model.vision.name open_clip/ViT-B-32-quickgelu"),
        ("ViT-L-14", "laion2b_s32b_b82k", "want other pixels than CLIP's; use model.vision.name open_clip/ViT-L-14"),
    ],
)
def test_published_weights_of_another_network_are_refused(name: str, tag: str, message: str) -> None:
    """Names and shapes would fit. Before anything is fetched."""
    config = VisionConfig(name=name, pretrained=tag, image_size=224)
    with torch.device("meta"):
        tower = build_tower(config)
    with pytest.raises(ValueError, match=message):
        load_vision(tower, config)


def test_every_tag_of_a_quickgelu_name_fits_it() -> None:
    """The refusal never sends anybody to a name that is refused too."""
    import open_clip

    for name, tags in open_clip.pretrained._PRETRAINED.items():
        for tag, known in tags.items():
            if known.get("quick_gelu") and name.startswith("ViT") and "quickgelu" not in name:
                other = open_clip.get_pretrained_cfg(f"{name}-quickgelu", tag)
                assert other.get("quick_gelu"), (name, tag, json.dumps(known))


def test_a_pickle_that_executes_code_is_refused(tmp_path: Path) -> None:
    """Invariant 7."""

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    config = config_of(saved(tmp_path, {"cls_token": Payload()}))
    with pytest.raises(ValueError, match="not a plain weights file"):
        load_vision(build_tower(config), config)
    assert not (tmp_path / "executed").exists()
