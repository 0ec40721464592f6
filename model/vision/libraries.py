"""How each library builds a backbone without weights, runs it up to its features, and normalises its pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.config import VisionConfig
from model.torchvision_shim import ensure_torchvision
from model.vision.clip import IMAGE_MEAN, IMAGE_STD, near


class Backbone(NamedTuple):
    """A module and the function that runs it: normalised pixels [B, 3, S, S] -> tokens [B, P, W] or map [B, W, h, w].

    ``mean`` and ``std`` are of the channels of pixels from 0 to 1. ``heads`` are names of parts that the library's
    weights have and this module was built without.
    """

    module: nn.Module
    function: Callable[[nn.Module, Tensor], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    heads: tuple[str, ...] = ()


def timm_backbone(name: str, config: VisionConfig) -> Backbone:
    """Any model of timm; transformers are built for the resolution asked for, convolutions take any."""
    ensure_torchvision()
    import timm

    settings = timm_settings(name, config)
    sizes = {"img_size": config.image_size} if settings.fixed_input_size else {}
    module = timm.create_model(name, pretrained=False, num_classes=0, **sizes)
    heads = (settings.classifier,) if isinstance(settings.classifier, str) else tuple(settings.classifier or ())
    function = timm_features if config.stage is None else _timm_stage(module, config.stage)
    return Backbone(module, function, settings.mean, settings.std, heads)


def timm_settings(name: str, config: VisionConfig) -> Any:
    """timm's record of a model and of weights for it: those that ``config.pretrained`` or the name's tag means.

    Raises:
        ValueError: no such model, or no such tag of it.
    """
    ensure_torchvision()
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {architecture!r}{near(architecture, timm.list_models())}")
    tagged = f"{architecture}.{config.pretrained}"
    if not tag and tagged in timm.models.get_arch_pretrained_cfgs(architecture):
        name = tagged
    try:
        settings = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        tags = [one.partition(".")[2] for one in timm.models.get_arch_pretrained_cfgs(architecture)]
        raise ValueError(f"timm has no weights {tag!r} of {architecture}{near(tag, tags)}") from None
    return settings


def timm_features(module: nn.Module, pixels: Tensor) -> Tensor:
    """What timm calls features: before pooling and classifier."""
    features = module.forward_features(pixels)
    is_channels_last = features.ndim == 4 and getattr(module, "output_fmt", "NCHW") == "NHWC"
    return features.permute(0, 3, 1, 2) if is_channels_last else features


def _timm_stage(module: nn.Module, stage: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """What the model gives in its midst; raises ValueError for a stage that it does not have."""
    if not hasattr(module, "forward_intermediates"):
        raise ValueError("tells no features of its parts; use model.vision.stage null")
    count = len(module.blocks) if hasattr(module, "patch_embed") else len(module.feature_info)
    if not 0 <= stage < count:
        raise ValueError(f"has parts 0 to {count - 1}, found model.vision.stage {stage}; use one of them, or null")

    def features(module: nn.Module, pixels: Tensor) -> Tensor:
        return module.forward_intermediates(pixels, indices=[stage], intermediates_only=True)[0]

    return features


def open_clip_backbone(name: str, config: VisionConfig) -> Backbone:
    """The image tower of any model of open_clip: its ViT with all blocks, its ResNet's last map, or one of timm."""
    ensure_torchvision()
    import open_clip
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    architecture = open_clip.get_model_config(name)
    if architecture is None:
        raise ValueError(f"open_clip has no model {name!r}{near(name, open_clip.list_models())}")
    settings = architecture["vision_cfg"] | {"image_size": config.image_size, "timm_model_pretrained": False}
    quick_gelu = architecture.get("quick_gelu", False)
    # not create_model, which builds the text tower too and asks the hub for some of them
    tower = _build_vision_tower(architecture["embed_dim"], CLIPVisionCfg(**settings), quick_gelu)
    mean, std = _open_clip_statistics(name, config.pretrained)
    if hasattr(tower, "trunk"):
        tower.set_input_size(config.image_size)
        return Backbone(tower.trunk, timm_features, mean, std)
    if hasattr(tower, "transformer"):
        return Backbone(tower, _open_clip_vit_tokens, mean, std)
    return Backbone(tower, _open_clip_resnet_map, mean, std)


def _open_clip_vit_tokens(tower: nn.Module, pixels: Tensor) -> Tensor:
    found = tower.forward_intermediates(
        pixels,
        indices=1,
        normalize_intermediates=tower.attn_pool is None,  # else the norm stands behind a pooling of another width
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    return torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)


def _open_clip_resnet_map(tower: nn.Module, pixels: Tensor) -> Tensor:
    return tower.forward_intermediates(pixels, indices=1, intermediates_only=True)["image_intermediates"][0]


def _open_clip_statistics(name: str, tag: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the weights meant, else of the first that open_clip lists for the model, else CLIP's."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    known = open_clip.get_pretrained_cfg(name, tag if tag in tags else next(iter(tags), ""))
    return tuple(known.get("mean") or IMAGE_MEAN), tuple(known.get("std") or IMAGE_STD)


def hf_backbone(name: str, config: VisionConfig) -> Backbone:
    """The image model that transformers' AutoModel builds for a name on the hub or a local folder; no code of it runs.

    Of a model of images and text the image tower is taken.
    """
    ensure_torchvision()
    import transformers
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        processing, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        folders = [str(path) for path in Path(name).parent.iterdir()] if Path(name).parent.is_dir() else []
        raise ValueError(
            f"neither a folder with config.json and preprocessor_config.json nor a model of the hub that can be had"
            f" ({reason}){near(name, folders)}"
        ) from error
    settings = getattr(settings, "vision_config", settings)
    if hasattr(settings, "image_size"):
        settings.image_size = config.image_size
    module = transformers.AutoModel.from_config(settings, dtype=torch.float32)
    if module.main_input_name != "pixel_values":
        raise ValueError(f"is a {type(module).__name__}, which reads {module.main_input_name}; name one of images")
    return Backbone(module, _hf_features, *_hf_statistics(processing))


def _hf_statistics(processing: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels from 0 to 1 that do what an image processor's settings say."""
    one = processing.get("rescale_factor", 1 / 255) * 255 if processing.get("do_rescale", True) else 255.0
    mean, std = [0.0] * 3, [1.0] * 3
    if processing.get("do_normalize", True):
        mean, std = processing["image_mean"], processing["image_std"]
    return tuple(value / one for value in mean), tuple(value / one for value in std)


def _hf_features(module: nn.Module, pixels: Tensor) -> Tensor:
    return module(pixel_values=pixels).last_hidden_state


LIBRARIES: dict[str, Callable[[str, VisionConfig], Backbone]] = {
    "open_clip": open_clip_backbone,
    "timm": timm_backbone,
    "hf": hf_backbone,
}
