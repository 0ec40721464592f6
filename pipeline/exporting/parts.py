"""The parts of an exported folder in the form of the libraries they come from: vision tower, language model, adapter.

timm reads the tower with ``timm.create_model("local-dir:FOLDER", pretrained=True)``, transformers with
``AutoModel.from_pretrained``; open_clip's names are those below ``visual.``. transformers reads the language model with
``AutoModelForCausalLM.from_pretrained``, peft the adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.config import LanguageConfig, ModelConfig
from model.frozen import frozen_tensors
from model.language.lora import ADAPTER as ADAPTER_NAMES
from model.vision.clip import VisionTower
from model.weights.start import foreign_names, named_tensors
from model.weights.towers import CLIP_RULES, EVA_RULES
from pipeline.exported.folder import ADAPTER, CONFIG, LANGUAGE, PROCESSOR, TOWER
from pipeline.exporting.streaming import Stored, stored, write_tensors
from pipeline.weights.sources import LANGUAGE as OUR_LANGUAGE
from pipeline.weights.sources import TOWER as OUR_TOWER

FORMAT = {"format": "pt"}  # in the metadata of every safetensors file: what accelerate and transformers ask for
ONE_FILE = 1 << 62
BICUBIC = 3  # of Pillow, as transformers numbers it


def trained_tensors(objective: nn.Module, dtype: torch.dtype) -> list[Stored]:
    """All that is not frozen, by our names."""
    frozen = frozen_tensors(objective)
    return [stored(name, value, dtype) for name, value in named_tensors(objective) if name not in frozen]


def frozen_parts(objective: nn.Module) -> list[str]:
    """Names of the folders that the frozen weights of a model go to."""
    names = frozen_tensors(objective)
    parts = {TOWER: OUR_TOWER, LANGUAGE: OUR_LANGUAGE}
    others = [name for name in names if not name.startswith(tuple(parts.values()))]
    assert not others, others
    return [part for part, prefix in parts.items() if any(name.startswith(prefix) for name in names)]


def write_tower(tower: nn.Module, config: ModelConfig, folder: Path, dtype: torch.dtype) -> None:
    """``vision_tower/`` with config.json, preprocessor_config.json and the weights by the library's names."""
    write_tower_settings(tower, config, folder)
    tensors = [stored(name, value, dtype) for name, value in tower_tensors(tower)]
    write_tensors(folder / TOWER, tensors, FORMAT, ONE_FILE)


def write_tower_settings(tower: nn.Module, config: ModelConfig, folder: Path) -> None:
    """``vision_tower/`` with what builds the tower and what its pixels are, without weights."""
    (folder / TOWER).mkdir()
    library, _, name = (config.vision.name or "").rpartition("/") if config.vision.name else ("", "", "")
    library = library.partition("/")[0]
    processor = processor_settings(tower, config.vision.image_size)
    if library == "hf":
        content = _without_place(tower.backbone.config)
    elif library == "timm":
        content = _timm_settings(tower, config, processor)
    else:
        content = {"library": library or "open_clip", "model": name or None, "layout": config.vision.layout}
        content |= {"image_size": config.vision.image_size, "drop_last_block": config.vision.drop_last_block}
    _write_json(folder / TOWER / CONFIG, content)
    _write_json(folder / TOWER / PROCESSOR, processor)


def tower_tensors(tower: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights of a vision tower by the names of the library it comes from; what frames tell each other has none."""
    if not isinstance(tower, VisionTower):
        yield from named_tensors(tower.backbone)
        return
    of_eva = tower.config.layout != "clip"
    for name, value in named_tensors(tower):
        if ".temporal." in name:
            continue
        (foreign,) = foreign_names(name, EVA_RULES if of_eva else CLIP_RULES)
        if of_eva and foreign in ("cls_token", "pos_embed"):
            value = value.view(1, -1, value.shape[-1])
        if of_eva and foreign.endswith("attn.qkv.bias") and not value.chunk(3)[1].any():
            block = foreign.removesuffix("qkv.bias")
            query, _, values = value.chunk(3)
            yield f"{block}q_bias", query
            yield f"{block}v_bias", values
            continue
        yield foreign, value


def processor_settings(tower: nn.Module, size: int) -> dict[str, Any]:
    """How pictures become pixels, as image processors of transformers name it."""
    mean, std = (tower.statistics.double().flatten(1) / 1e6 / 255).tolist()
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def write_language(language: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """``language_model/``, which transformers reads; without adapters, which are trained."""
    (folder / LANGUAGE).mkdir()
    settings = _without_place(language.llm.config) | {"dtype": str(dtype).removeprefix("torch.")}
    settings |= {"architectures": [type(language.llm).__name__]}
    _write_json(folder / LANGUAGE / CONFIG, settings)
    own = ((name, value) for name, value in named_tensors(language.llm) if not re.fullmatch(ADAPTER_NAMES, name))
    write_tensors(folder / LANGUAGE, [stored(name, value, dtype) for name, value in own], FORMAT)


def write_adapter(language: nn.Module, config: LanguageConfig, folder: Path, dtype: torch.dtype) -> None:
    """``adapter/``: the LoRA of a language model as peft names it, beside our own in the trained weights."""
    (folder / ADAPTER).mkdir()
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.lora_modules),
        "base_model_name_or_path": f"../{LANGUAGE}",
        "inference_mode": True,
    }
    _write_json(folder / ADAPTER / "adapter_config.json", content)
    sides = {"down": "lora_A", "up": "lora_B"}
    tensors = []
    for name, value in named_tensors(language.llm):
        if re.fullmatch(ADAPTER_NAMES, name):
            layer, side = re.fullmatch(r"(.+)\.adapter\.(down|up)\.weight", name).groups()
            tensors.append(stored(f"base_model.model.{layer}.{sides[side]}.weight", value, dtype))
    written = write_tensors(folder / ADAPTER, tensors, FORMAT, ONE_FILE)
    (folder / ADAPTER / written[0]).rename(folder / ADAPTER / "adapter_model.safetensors")


def _timm_settings(tower: nn.Module, config: ModelConfig, processor: dict[str, Any]) -> dict[str, Any]:
    """As timm writes it for the hub (``timm.create_model("local-dir:FOLDER")`` reads it)."""
    vision, cfg = config.vision, tower.backbone.pretrained_cfg
    content: dict[str, Any] = {
        "architecture": vision.name.removeprefix("timm/").partition(".")[0],
        "num_classes": 0,
        "num_features": tower.backbone.num_features,
        "pretrained_cfg": {
            "input_size": [3, vision.image_size, vision.image_size],
            "fixed_input_size": bool(cfg.get("fixed_input_size", False)),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": processor["image_mean"],
            "std": processor["image_std"],
            "num_classes": 0,
            "first_conv": cfg.get("first_conv"),
            "classifier": cfg.get("classifier"),
        },
    }
    if cfg.get("fixed_input_size", False):
        content["model_args"] = {"img_size": vision.image_size}
    return content


def _without_place(settings: Any) -> dict[str, Any]:
    """A configuration of transformers without where on this machine it was."""
    return {name: value for name, value in settings.to_dict().items() if name != "_name_or_path"}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
