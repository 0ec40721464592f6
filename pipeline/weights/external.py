"""Files of the weights of towers of other libraries: local ones, and those that a library's tag means on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.config import AUTO, VisionConfig
from model.torchvision_shim import ensure_torchvision
from model.vision.clip import near
from model.vision.external import ExternalTower
from model.vision.libraries import timm_settings
from model.weights.external import fill_external
from model.weights.start import Loaded
from model.weights.towers import refuse_other_activation
from pipeline.weights.files import read_state_dict


def load_external(tower: ExternalTower, config: VisionConfig) -> Loaded:
    """Gives a tower of another library the weights that ``config.pretrained`` names: a local file, or a tag.

    Raises:
        ValueError: no such weights, or they do not fit the tower; it is as it was before.
    """
    source = f"model.vision.pretrained {config.pretrained}"
    try:
        state, beside = _read(config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    loaded = fill_external(tower, state, config.name, source)
    return Loaded(loaded.loaded, loaded.resized, loaded.fresh, loaded.dropped + beside)


def _read(config: VisionConfig) -> tuple[Mapping[str, Tensor], list[str]]:
    """Tensors by name of the file, folder or tag that ``config`` names, and names that were left out already."""
    path, is_hf = Path(config.pretrained), config.name.startswith("hf/")
    if not path.is_file() and not (is_hf and path.is_dir()):
        path = _fetched(*published_files(config))
    if not is_hf:
        return read_state_dict(path), []
    folder = path if path.is_dir() else path.parent
    return _read_hf_folder(folder) if (folder / "config.json").is_file() else (read_state_dict(path), [])


def _read_hf_folder(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """By transformers itself, whose files and models name tensors differently; what it would draw anew is left out."""
    ensure_torchvision()
    import transformers

    try:
        model, info = transformers.AutoModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # settings of others make it raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"transformers can't read it ({reason})") from error
    found = {name: value for name, value in model.state_dict().items() if name not in info["missing_keys"]}
    return found, sorted(info["unexpected_keys"])


def published_files(config: VisionConfig) -> tuple[str, ...]:
    """Repository of the Hugging Face hub and its files that ``config.pretrained`` means, the weights last.

    auto means what the library takes by default.

    Raises:
        ValueError: neither a file nor a tag that the library has for this model.
    """
    library, _, name = config.name.partition("/")
    ensure_torchvision()
    if library == "hf":
        return name if config.pretrained == AUTO else config.pretrained, "config.json", "model.safetensors"
    if library == "timm":
        import timm

        settings = timm_settings(name, config)
        tags = {one.partition(".")[2] for one in timm.models.get_arch_pretrained_cfgs(name)}
        if config.pretrained not in (AUTO, settings.tag):
            raise ValueError(f"neither a file nor a tag of timm's {name}{near(config.pretrained, tags)}")
        if not settings.hf_hub_id:
            raise ValueError(f"timm has no weights of {name} on the hub; give a local file, or null")
        return settings.hf_hub_id, settings.hf_hub_filename or "model.safetensors"
    import open_clip

    tag = "openai" if config.pretrained == AUTO else config.pretrained
    known = open_clip.get_pretrained_cfg(name, tag)
    if not known.get("hf_hub"):
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"neither a file nor a tag of open_clip's {name} on the hub ({', '.join(tags) or 'none'})")
    architecture = open_clip.get_model_config(name)
    if isinstance(architecture["vision_cfg"].get("layers"), int):  # its ViT; its ResNet and timm's know one activation
        refuse_other_activation(f"open_clip/{name}", architecture.get("quick_gelu", False), tag, known)
    repository, _, file = known["hf_hub"].rpartition("/")
    return repository, file or "open_clip_model.safetensors"


def _fetched(repository: str, *names: str) -> Path:
    """The last of these files of the hub, all of them in its folder of the local cache."""
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(repository, name)) for name in names][-1]
    except Exception as error:  # many libraries speak below; all mean that the hub can't be used
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"{names[-1]} of {repository} can't be had from the hub ({reason}); give a local file, or null for random"
            " initialisation"
        ) from error
