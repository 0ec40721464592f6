"""Videos in the vision tower: the release's numbers, what frames know of each other, EVA-CLIP's ViT."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.config import VisionConfig
from model.vision.clip import VisionTower, resolve_sizes
from model.vision.temporal import OrderedTemporalAttention, ReleasedTemporalAttention, frame_positions
from model.vision.tower import build_tower
from model.weights.start import start_from
from model.weights.towers import eva_image_encoder
from tests.oracle import GRADIENT, assert_near, eva_config, load_oracle
from tests.rounding import DOUBLE

SMALL = dict(name=None, image_size=16, patch_size=8, width=32, layers=3, head_width=8, layout="eva", quick_gelu=False)


@pytest.mark.parametrize("number", range(4))
def test_equal_to_the_release(number: int) -> None:
    case = load_oracle("07_temporal_unit.pt", "evlgen")[number]
    model = ReleasedTemporalAttention(case["D"])
    start_from(model, case["state_dict"])
    tokens = case["x"].clone().requires_grad_()
    mine = model(tokens, case["T"])
    assert_near(mine, case["y"])
    (mine * case["probe_weight"]).mean().backward()
    assert_near(tokens.grad, case["grad_x"], GRADIENT)
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, case["grad_params"][name], GRADIENT)


def test_eva_is_equal_to_the_release() -> None:
    dump = load_oracle("08_eva_image_tiny.pt", "evlgen")
    config = eva_config(dump["config"])
    tower = VisionTower(config).eval()
    foreign = eva_image_encoder(dump["state_dict"], config)
    loaded = start_from(tower, foreign.state, foreign.rules, "EVA", (), foreign.dropped)
    assert not loaded.fresh and not loaded.dropped
    outputs = []
    for block in tower.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    assert_near(tower(dump["image"]), dump["features"])
    for mine, theirs in zip(outputs, dump["block_outputs"], strict=True):
        assert_near(mine, theirs)


@pytest.mark.parametrize("kind", ["released", "ordered"])
def test_its_linear_layers_are_counted(kind: str) -> None:
    """As PyTorch counts them, twice a multiply-accumulate; the attention of four frames is what is left out."""
    tower = VisionTower(VisionConfig(**SMALL, temporal=kind))
    plain = VisionTower(VisionConfig(**SMALL))
    with FlopCounterMode(display=False) as counter:
        for block in tower.blocks:
            block.temporal(torch.zeros(4, tower.num_tokens, tower.width), 4)
    counts = counter.get_flop_counts()["Global"]
    total = counts.get(torch.ops.aten.addmm, 0) + counts.get(torch.ops.aten.mm, 0)
    assert total == 2 * 4 * (tower.macs - plain.macs)


def test_the_released_tower_by_name() -> None:
    """Its sizes, and the parameters of the specification (section 2): 985.9 M, 28.13 M of which a video adds."""
    with torch.device("meta"):
        tower = VisionTower(resolve_sizes(VisionConfig(name="eva-vit-g", image_size=224, temporal="released")))
    assert (tower.width, tower.num_tokens, len(tower.blocks)) == (1408, 257, 39)
    temporal = sum(p.numel() for name, p in tower.named_parameters() if "temporal" in name)
    assert temporal == 28_134_951
    key_biases = 39 * 1408  # zeros, which the release does not store
    total = sum(parameter.numel() for parameter in tower.parameters()) - temporal - key_biases
    assert round(total / 1e6, 1) == 985.9


def video_tower(temporal: str | None) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower(VisionConfig(temporal=temporal, **SMALL)).eval()


def frames(num_videos: int = 2, num_frames: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_videos * num_frames, 3, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("temporal", ["released", "ordered"])
def test_a_video_tower_begins_as_the_tower_of_images(temporal: str) -> None:
    images, model = video_tower(None), video_tower(temporal)
    model.load_state_dict(images.state_dict(), strict=False)
    assert torch.equal(model(frames(), 4), images(frames()))


def open_gates(tower: VisionTower) -> VisionTower:
    for module in tower.modules():
        if isinstance(module, ReleasedTemporalAttention):
            nn.init.constant_(module.alpha, 0.7)
        elif isinstance(module, OrderedTemporalAttention):
            nn.init.normal_(module.out.weight, std=0.1)
    return tower


def test_what_the_order_of_frames_changes() -> None:
    """Nothing in the released way, where frames only come out in another order; something in the ordered one."""
    order, close = torch.tensor([2, 0, 3, 1]), {"rtol": 0, "atol": DOUBLE}
    shuffled = frames().unflatten(0, (2, 4))[:, order].flatten(0, 1)
    for temporal, is_blind in (("released", True), ("ordered", False)):
        tower = open_gates(video_tower(temporal)).double()
        once, again = (tower(images, 4).unflatten(0, (2, 4)) for images in (frames(), shuffled))
        assert torch.allclose(once[:, order], again, **close) == is_blind
        assert torch.allclose(once.mean(1), again.mean(1), **close) == is_blind
        assert not torch.allclose(once.flatten(0, 1), tower(frames()), **close), "frames know of each other"
        alone = torch.cat([tower(video, 4) for video in frames().split(4)])
        assert torch.allclose(alone, once.flatten(0, 1), **close), "videos do not"


def test_still_frames_are_an_image_in_the_released_way() -> None:
    tower = open_gates(video_tower("released")).double()
    still = frames(2, 1).repeat_interleave(4, dim=0)
    torch.testing.assert_close(tower(still, 4)[::4], tower(frames(2, 1)), rtol=0, atol=DOUBLE)


def test_frames_stand_at_different_places() -> None:
    positions = frame_positions(64, 32, torch.device("cpu"))
    distances = torch.cdist(positions, positions) + 9 * torch.eye(64)
    assert distances.min() > 0.1 and positions.abs().max() <= 1


def test_a_tower_of_another_library_has_no_frames() -> None:
    with pytest.raises(ValueError, match="temporal ordered: the blocks of timm/resnet18 are another library's"):
        build_tower(VisionConfig(name="timm/resnet18", temporal="ordered"))


def test_a_width_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"width 24 is not a multiple of 16, as model.vision.temporal needs"):
        VisionTower(VisionConfig(temporal="ordered", **SMALL | {"width": 24}))
