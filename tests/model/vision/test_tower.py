"""Towers of other libraries compute what their library computes, from pixels, and say what they cost."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from model.build import build_objective
from model.config import VisionConfig, objective_options
from model.torchvision_shim import ensure_torchvision
from model.vision.clip import VisionTower, resolve_sizes
from model.vision.dry_run import cost, cut_unused
from model.vision.external import ExternalTower, grid_positions
from model.vision.tower import build_tower
from tests.rounding import DOUBLE
from tests.tiny_flm import VOCABULARY, caption, pair_rows, tiny_config

ensure_torchvision()

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def pixels(size: int, count: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def normalised(images: torch.Tensor, statistics: tuple) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return (images.float() / 255 - mean) / std


def tower_of(name: str, size: int, **options) -> ExternalTower:
    torch.manual_seed(0)
    return build_tower(VisionConfig(name=name, image_size=size, **options)).eval()


def check_map(tower: ExternalTower, tokens: torch.Tensor, theirs: torch.Tensor) -> None:
    """``theirs`` [B, W, h, w]: rows one after the other, and timm's positions added."""
    from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

    positions = build_sincos2d_pos_embed(list(theirs.shape[2:]), theirs.shape[1])
    torch.testing.assert_close(tower.features(pixels(64)), theirs)
    flat = torch.stack([theirs[:, :, y, x] for y in range(theirs.shape[2]) for x in range(theirs.shape[3])], dim=1)
    torch.testing.assert_close(tokens, flat + positions, rtol=1e-4, atol=2e-6)  # positions are kept in millionths


@pytest.mark.parametrize(
    ("name", "statistics"), [("test_efficientnet", IMAGENET), ("test_convnext", HALF), ("test_resnet", HALF)]
)
def test_a_feature_map_of_timm_becomes_tokens(name: str, statistics: tuple) -> None:
    """On 64 px; convnext has a head with parameters, which go."""
    import timm

    tower = tower_of(f"timm/{name}", 64)
    theirs = timm.create_model(name, num_classes=0).eval()
    theirs.load_state_dict(tower.backbone.state_dict(), strict=False)
    with torch.no_grad():
        tokens = tower(pixels(64))
        check_map(tower, tokens, theirs.forward_features(normalised(pixels(64), statistics)))
    assert tokens.shape == (2, tower.num_tokens, tower.width) == (2, 4, theirs.num_features)
    assert (tower.cut == ["head"]) == (name == "test_convnext"), tower.cut


@pytest.mark.parametrize("size", [160, 48])
def test_tokens_of_a_vit_of_timm(size: int) -> None:
    import timm

    tower = tower_of("timm/test_vit", size)
    theirs = timm.create_model("test_vit", num_classes=0, img_size=size).eval()
    theirs.load_state_dict(tower.backbone.state_dict())
    with torch.no_grad():
        tokens = tower(pixels(size))
        expected = theirs.forward_features(normalised(pixels(size), HALF))
    torch.testing.assert_close(tokens, expected)
    assert tokens.shape == (2, tower.num_tokens, tower.width) == (2, 1 + (size // 16) ** 2, 64)
    assert tower.positions.shape == (0, 64), "it has positions of its own"


@pytest.fixture
def open_clip_models(tmp_path: Path):
    """Small models that open_clip knows by name: a ViT, CLIP's ResNet, a timm trunk."""
    import open_clip

    text = {"context_length": 8, "vocab_size": 9, "width": 32, "heads": 2, "layers": 1}
    towers = {
        "tiny-vit": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
        "tiny-rn": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "tiny-trunk": {"image_size": 32, "timm_model_name": "test_convnext", "timm_pool": "avg"},
    }
    for name, vision in towers.items():
        content = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    yield
    for name in towers:
        (tmp_path / f"{name}.json").unlink()
    open_clip.factory._rescan_model_configs()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_vit"])
def test_an_earlier_part_of_a_timm_model(name: str) -> None:
    """The map of a part in the midst, with the same weights; what stands behind it is left out and costs nothing."""
    import timm

    size = 160 if name == "test_vit" else 64
    whole = tower_of(f"timm/{name}", size)
    tower = tower_of(f"timm/{name}", size, stage=1)
    own = tower.backbone.state_dict()
    tower.backbone.load_state_dict({key: value for key, value in whole.backbone.state_dict().items() if key in own})
    images = pixels(size)
    model = timm.create_model(name, num_classes=0, **({"img_size": size} if name == "test_vit" else {})).eval()
    model.load_state_dict(whole.backbone.state_dict(), strict=False)
    found = model.forward_intermediates(normalised(images, IMAGENET if name == "test_efficientnet" else HALF))[1][1]
    torch.testing.assert_close(tower.features(images), found)
    assert tower.num_tokens == found.shape[2] * found.shape[3] and tower.width == found.shape[1]
    assert tower.macs < whole.macs and tower.cut


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        ("timm/test_resnet", 5, "has parts 0 to 4, found model.vision.stage 5"),
        ("timm/test_vit", -1, "has parts 0 to 5, found model.vision.stage -1"),
        ("open_clip/RN50", 1, "model.vision.stage 1 is of timm/NAME only, found model.vision.name open_clip/RN50"),
        (None, 1, "model.vision.stage 1 is of timm/NAME only, found model.vision.name None"),
    ],
)
def test_a_part_that_does_not_exist(name: str | None, stage: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_tower(VisionConfig(name=name, image_size=64, stage=stage))


def test_image_towers_of_open_clip(open_clip_models: None) -> None:
    """Against the layers of the library's own modules, at another resolution than they were made for."""
    with torch.no_grad():
        vit = tower_of("open_clip/tiny-vit", 64)
        x = vit.backbone.conv1(normalised(pixels(64), CLIP)).flatten(2).transpose(1, 2)
        x = torch.cat([vit.backbone.class_embedding.expand(2, 1, -1), x], dim=1) + vit.backbone.positional_embedding
        expected = vit.backbone.ln_post(vit.backbone.transformer(vit.backbone.ln_pre(x)))
        torch.testing.assert_close(vit(pixels(64)), expected)
        assert (vit.num_tokens, vit.width, vit.cut) == (17, 32, ["proj"])

        resnet = tower_of("open_clip/tiny-rn", 64)
        x = resnet.backbone.stem(normalised(pixels(64), CLIP))
        for layer in (resnet.backbone.layer1, resnet.backbone.layer2, resnet.backbone.layer3, resnet.backbone.layer4):
            x = layer(x)
        check_map(resnet, resnet(pixels(64)), x)
        assert (resnet.num_tokens, resnet.width, resnet.cut) == (4, 256, ["attnpool"])

        trunk = tower_of("open_clip/tiny-trunk", 64)
        check_map(trunk, trunk(pixels(64)), trunk.backbone.forward_features(normalised(pixels(64), CLIP)))


def hf_folder(folder: Path, settings, **processing) -> Path:
    """A local folder as transformers finds a model in, without weights."""
    settings.save_pretrained(folder)
    content = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 255} | processing
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


def hf_vit_settings(**changes):
    import transformers

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return transformers.ViTConfig(**sizes | dict(image_size=32, patch_size=16) | changes)


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    """A ViT at another resolution and a ResNet; mean and deviation are those of the folder."""
    import transformers

    statistics = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    vit = tower_of(f"hf/{hf_folder(tmp_path / 'vit', hf_vit_settings(), do_rescale=True)}", 64)
    theirs = transformers.ViTModel(hf_vit_settings(image_size=64)).eval()
    theirs.load_state_dict(vit.backbone.state_dict(), strict=False)
    sizes = dict(embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic")
    resnet = tower_of(f"hf/{hf_folder(tmp_path / 'resnet', transformers.ResNetConfig(**sizes))}", 64)
    with torch.no_grad():
        expected = theirs(pixel_values=normalised(pixels(64), statistics)).last_hidden_state
        torch.testing.assert_close(vit(pixels(64)), expected)
        assert (vit.num_tokens, vit.width, vit.cut) == (17, 32, ["pooler"])
        features = resnet.backbone(pixel_values=normalised(pixels(64), statistics)).last_hidden_state
        check_map(resnet, resnet(pixels(64)), features)
    raw = tower_of(f"hf/{hf_folder(tmp_path / 'raw', hf_vit_settings(), do_rescale=False)}", 32)
    torch.testing.assert_close(raw.statistics[0].flatten() / 1e6, torch.tensor([0.1, 0.2, 0.3]))


def test_positions_tell_the_rows_and_columns_of_any_map_apart() -> None:
    """Also where the width is no multiple of 4; equal to timm's where it is."""
    from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

    torch.testing.assert_close(grid_positions(3, 5, 16), build_sincos2d_pos_embed([3, 5], 16))
    assert grid_positions(3, 5, 18).shape == (15, 18)
    assert len({tuple(row) for row in grid_positions(3, 5, 18).tolist()}) == 15


@pytest.mark.slow
def test_multiply_accumulates_in_closed_form() -> None:
    """Of a convolution and a matrix product; of a ViT as the CLIP tower counts them."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(5 * 64, 7))
    shape, macs = cost(network, lambda module, value: module(value), (2, 3, 8, 8))
    assert (shape, macs) == ((2, 7), 2 * (64 * 5 * 3 * 9 + 5 * 64 * 7))

    sizes = dict(patch_size=32, width=384, layers=12, head_width=64, mlp_ratio=4.0, drop_last_block=False)
    theirs = tower_of("open_clip/ViT-S-32", 96)
    ours = VisionTower(VisionConfig(name=None, image_size=96, **sizes))
    assert (theirs.macs, theirs.num_tokens, theirs.width) == (ours.macs, ours.num_tokens, ours.width)
    linear, attention = 10 * (4 * 384**2 + 2 * 384 * 1536), 2 * 10**2 * 384
    assert ours.macs == 9 * 3 * 32 * 32 * 384 + 12 * (linear + attention)
    named = resolve_sizes(VisionConfig(name="ViT-B-32-quickgelu", image_size=288))
    with torch.device("meta"):  # 11 of 12 blocks, 82 tokens of 768
        linear, attention = 82 * 12 * 768**2, 2 * 82**2 * 768
        assert VisionTower(named).macs == 81 * 3 * 32 * 32 * 768 + 11 * (linear + attention)


def test_what_no_token_depends_on_is_removed() -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = torch.nn.Linear(3, 3), torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())
            self.mask_token = torch.nn.Parameter(torch.zeros(3))

        def forward(self, value):
            states = self.body(value)
            self.head(states)
            return states

    network = Network()
    assert cut_unused(network, lambda module, value: module(value), (1, 3)) == ["head", "mask_token"]
    assert [name for name, _ in network.named_parameters()] == ["body.weight", "body.bias"] and network.training
    network(torch.zeros(1, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_batch_normalisation_uses_its_running_statistics_in_training() -> None:
    """Invariant 5: what an image becomes does not depend on the images beside it; the statistics stay those loaded."""
    tower = tower_of("timm/test_efficientnet", 32).double().train()
    before = copy.deepcopy(dict(tower.named_buffers()))
    assert any(name.endswith("num_batches_tracked") for name in before)
    together, alone = tower(pixels(32)), tower(pixels(32)[:1])
    torch.testing.assert_close(together[:1].double(), alone.double(), rtol=DOUBLE, atol=DOUBLE)
    together.sum().backward()
    assert all(torch.equal(before[name], value) for name, value in tower.named_buffers())
    assert all(parameter.grad is not None for parameter in tower.parameters()), "scales and shifts are trained"


def test_bf16_leaves_normalisation_and_positions_exact() -> None:
    tower = tower_of("timm/test_resnet", 64)
    exact = [tower.statistics.clone(), tower.positions.clone()]
    tokens = tower(pixels(64))
    tower.to(torch.bfloat16)
    assert torch.equal(tower.statistics, exact[0]) and torch.equal(tower.positions, exact[1])
    low = tower(pixels(64))
    assert low.dtype == torch.bfloat16
    assert (low.float() - tokens).norm() < 0.05 * tokens.norm()  # 8 bits through about 20 layers


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("timm/resnet19", 64, "timm has no model 'resnet19'; did you mean resnet18"),
        ("timm/resnet18.a1_in1", 64, "timm has no weights 'a1_in1' of resnet18; did you mean a1_in1k"),
        ("timm/efficientformer_l1", 64, "can't run on images of 64 px"),
        ("timm/test_vit", 8, "can't run on images of 8 px .*choose another model.vision.image_size"),
        ("open_clip/ViT-B-33", 64, "open_clip has no model 'ViT-B-33'; did you mean ViT-B-32"),
        ("hf/./nowhere", 64, "neither a folder with config.json and preprocessor_config.json nor a model of the hub"),
        ("keras/resnet18", 64, "no library 'keras'; expected open_clip/NAME, timm/NAME, hf/NAME, the name of"),
        ("ViT-B-33", 64, "is not an open_clip architecture; did you mean ViT-B-32"),
        ("RN50", 64, "is not a plain CLIP ViT .* or open_clip/RN50"),
    ],
)
def test_names_and_sizes_that_do_not_exist(name: str, size: int, message: str) -> None:
    """Invariant 9: in one line."""
    with pytest.raises(ValueError, match=message) as error:
        build_tower(VisionConfig(name=name, image_size=size))
    assert "\n" not in str(error.value) and f"model.vision.name {name}".split(" ")[0] in str(error.value)


def test_a_network_around_such_a_tower() -> None:
    """Width, tokens and cost are the tower's; the cost agrees with PyTorch's counter within 1 %."""
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config()
    config.vision = VisionConfig(name="timm/test_efficientnet", image_size=64)
    torch.manual_seed(0)
    objective = build_objective(config, objective_options(name="ar"), VOCABULARY, 24)
    net = objective.net
    assert net.image_projection.in_features == net.vision.width == 256 and net.vision.num_tokens == 4
    batch = objective.planner(pixels(64, 3).unsqueeze(1), pair_rows([caption(5), caption(9), caption(2)]))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.vision(batch.images[:, 0])
    assert counter.get_total_flops() == 2 * 3 * net.vision.macs
    sum(objective(batch).values()).backward()
    unused = [name for name, parameter in net.vision.named_parameters() if parameter.grad is None]
    assert unused == []
    assert objective.flops(batch) > 6 * 3 * net.vision.macs


def test_running_statistics_stay_fp32_beside_bf16_weights() -> None:
    """As under DeepSpeed's bf16, which casts parameters only; the statistics are what they were, unrounded."""
    torch.manual_seed(0)
    tower = build_tower(VisionConfig(name="timm/resnet18", image_size=64))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for name, buffer in tower.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(1.01 + torch.rand_like(buffer))
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    with torch.no_grad():
        expected = tower(images)
        for parameter in tower.parameters():
            parameter.data = parameter.data.bfloat16()
        found = tower(images)
    assert found.dtype == torch.bfloat16
    # about 40 operations in sequence round by 2**-9 of the scale at most: a random walk, with a margin of 4
    assert (found.float() - expected).std() / expected.std() < 4 * 40**0.5 * 2**-9
    after = dict(tower.named_buffers())
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())
