"""Weights of vision towers: which file of which library they are in, and which of its tensors make up which of ours."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from model.config import AUTO, VisionConfig
from model.torchvision_shim import ensure_torchvision
from model.vision.clip import VisionTower, near, resize_positions
from model.vision.external import ExternalTower
from model.vision.libraries import timm_settings
from model.weights.towers import load_vision, read_state_dict, refuse_other_activation

# Names that older files have and newer models do not, or the other way round: made anew, not learned.
RECOMPUTED = r"(.+\.)?(position_ids|relative_position_index|attn_mask|num_batches_tracked)"
POSITIONS = r"(.+\.)?(pos_embed|positional_embedding|position_embeddings?(\.weight)?)"


class LoadedTower(NamedTuple):
    """What became of every name: the tower's that were ``loaded``, some of them ``resized``, or stayed ``fresh``; the
    file's that were ``dropped``."""

    loaded: list[str]
    resized: list[str]
    fresh: list[str]
    dropped: list[str]


def load_tower(tower: nn.Module, config: VisionConfig) -> None:
    """Gives any tower the weights that ``config.pretrained`` names: a local file, or a tag of its library's.

    Raises:
        ValueError: no such weights, or they do not fit the tower; it is as it was before.
    """
    if isinstance(tower, VisionTower):
        load_vision(tower, config)
    else:
        load_external(tower, config)


def load_external(tower: ExternalTower, config: VisionConfig) -> LoadedTower:
    """As :func:`load_tower`, for a tower of another library; strict by name.

    A file may hold a whole model, below any prefix: what lies outside of the prefix of the tower's names is dropped,
    and so are the parts that the tower was built without (classifier, pooler). Position tables are resized.
    """
    try:
        state, beside = _read(config)
        targets = tower.backbone.state_dict()
        own, others = _own_names(state, list(targets), config.name)
        loaded = _fill(targets, own, [*tower.cut, *tower.heads])
    except ValueError as error:
        raise ValueError(f"model.vision.pretrained {config.pretrained}: {error}") from error
    return loaded._replace(dropped=loaded.dropped + others + beside)


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
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"transformers can't read it ({str(error).splitlines()[0]})") from error
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


def _own_names(state: Mapping[str, Tensor], ours: list[str], model: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the tower's model by its library's names, and the file's names of all that is beside it."""
    if "_conv_stem.weight" in state:
        if not model.startswith("timm/tf_efficientnet"):
            raise ValueError("these are weights of efficientnet-pytorch, for model.vision.name timm/tf_efficientnet_..")
        return from_efficientnet_pytorch(state, ours), []
    prefix = _prefix(state, ours)
    beside = sorted(key for key in state if not key.startswith(prefix))
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}, beside


def _prefix(state: Mapping[str, Tensor], ours: list[str]) -> str:
    """What stands before the tower's names in a file that may hold a whole model."""
    needed = [name for name in ours if not re.fullmatch(RECOMPUTED, name)]
    prefixes = {key.removesuffix(needed[0]) for key in state if f".{key}".endswith(f".{needed[0]}")}
    held = {prefix: sum(prefix + name in state for name in needed) for prefix in prefixes}
    best = sorted(prefix for prefix in held if held[prefix] == max(held.values()))
    if not best:
        found = ", ".join(sorted(state)[:3]) or "nothing"
        raise ValueError(f"has no tensor {needed[0]} (found {found} ..); is it of this model and library?")
    if len(best) > 1:
        raise ValueError(f"holds the tower {len(best)} times, below {' and '.join(map(repr, best))}; keep one of them")
    return best[0]


# Parts of a block of timm's EfficientNet -> of efficientnet-pytorch's; a block that does not widen its input has less.
WIDENING = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
WIDENING |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
PLAIN = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
SQUEEZE = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
ENDS = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}


def from_efficientnet_pytorch(state: Mapping[str, Tensor], ours: Iterable[str]) -> dict[str, Tensor]:
    """Weights of lukemelas' efficientnet-pytorch (and -lite) by timm's names; ``ours`` are those of timm's model.

    Blocks are counted through there, by stage here.

    Raises:
        ValueError: another number of blocks, or a tensor that belongs to none of the known parts.
    """
    places = sorted(
        {(int(match[1]), int(match[2])) for name in ours if (match := re.match(r"blocks\.(\d+)\.(\d+)\.", name))}
    )
    count = 1 + max(int(match[1]) for key in state if (match := re.match(r"_blocks\.(\d+)\.", key)))
    if count != len(places):
        raise ValueError(
            f"has {count} blocks, the tower {len(places)}; set model.vision.name to the model of these weights"
        )
    owner = {theirs: part for part, theirs in ENDS.items()}
    for number, (stage, index) in enumerate(places):
        is_widening = f"_blocks.{number}._expand_conv.weight" in state
        parts = (WIDENING if is_widening else PLAIN) | SQUEEZE
        owner |= {f"_blocks.{number}.{theirs}": f"blocks.{stage}.{index}.{part}" for part, theirs in parts.items()}
    found = {}
    for key, value in state.items():
        part, _, kind = key.rpartition(".")
        if part not in owner:
            raise ValueError(f"has {key}, which no EfficientNet of timm has")
        found[f"{owner[part]}.{kind}"] = value
    return found


def _fill(targets: dict[str, Tensor], state: Mapping[str, Tensor], removed: Iterable[str]) -> LoadedTower:
    """Copies tensors into those of equal name, or none; ``removed`` are parts that the tower was built without."""
    values: dict[str, Tensor] = {}
    resized, fresh = [], []
    for name, target in targets.items():
        if name not in state:
            if not re.fullmatch(RECOMPUTED, name):
                raise ValueError(f"lacks {name}; is it of this model and depth?")
            fresh.append(name)
            continue
        value = _resized(name, state[name], target.shape)
        if value.shape != target.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, the tower's {tuple(target.shape)}; set model.vision.name to"
                " the model of these weights"
            )
        values[name] = value
        resized += [name] if value.shape != state[name].shape else []
    dropped = sorted(set(state) - set(targets))
    known = "|".join([RECOMPUTED, *(rf"{re.escape(part)}(\..+)?" for part in removed)])
    unread = [name for name in dropped if not re.fullmatch(known, name)]
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise ValueError(f"has {unread[0]}{more}, for which the tower has no place; is it of this model and depth?")
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)
    return LoadedTower(list(values), resized, fresh, dropped)


def _resized(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A position table [.., rows, W], of some single tokens and a square grid, brought to the grid of ``shape``."""
    others = [(*one[:-2], *one[-1:]) for one in (value.shape, shape)]
    if not re.fullmatch(POSITIONS, name) or value.shape == shape or others[0] != others[1]:
        return value
    grid = math.isqrt(shape[-2])
    singles = shape[-2] - grid * grid
    if math.isqrt(max(value.shape[-2] - singles, 0)) ** 2 != value.shape[-2] - singles:
        return value
    table = value.reshape(-1, shape[-1])
    square = resize_positions(torch.cat([table[:1], table[singles:]]), grid)[1:]
    return torch.cat([table[:singles], square]).reshape(shape)
