"""Weights of towers of other libraries: which tensors of a file make up which of the tower's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from model.vision.clip import resize_positions
from model.vision.external import ExternalTower
from model.weights.start import Loaded, start_from

# Names that older files have and newer models do not, or the other way round: made anew, not learned.
RECOMPUTED = r"(.+\.)?(position_ids|relative_position_index|attn_mask|num_batches_tracked)"
POSITIONS = r"(.+\.)?(pos_embed|positional_embedding|position_embeddings?(\.weight)?)"


def fill_external(tower: ExternalTower, state: Mapping[str, Tensor], model: str, source: str) -> Loaded:
    """Gives a tower of another library the weights in ``state``; ``model`` is its model.vision.name. Strict by name.

    A file may hold a whole model, below any prefix: what lies outside of the prefix of the tower's names is dropped,
    and so are the parts that the tower was built without (classifier, pooler). Position tables are resized.

    Raises:
        ValueError: they do not fit the tower; it is as it was before.
    """
    try:
        own, beside = _own_names(state, list(tower.backbone.state_dict()), model, tower.cut)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    without = [rf"{re.escape(part)}(\..+)?" for part in (*tower.cut, *tower.heads)]
    loaded = start_from(
        tower.backbone,
        own,
        source=source,
        fresh=[RECOMPUTED],
        dropped=[RECOMPUTED, *without],
        resizes=((POSITIONS, _positions),),
    )
    return Loaded(loaded.loaded, loaded.resized, loaded.fresh, loaded.dropped + beside)


def _own_names(
    state: Mapping[str, Tensor], ours: list[str], model: str, cut: list[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the tower's model by its library's names, and the file's names of all that is beside it."""
    if "_conv_stem.weight" in state:
        if not model.startswith("timm/tf_efficientnet"):
            raise ValueError("these are weights of efficientnet-pytorch, for model.vision.name timm/tf_efficientnet_..")
        return from_efficientnet_pytorch(state, ours, cut)
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


def from_efficientnet_pytorch(
    state: Mapping[str, Tensor], ours: Iterable[str], cut: Iterable[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of lukemelas' efficientnet-pytorch (and -lite) by timm's names; ``ours`` are those of timm's model.

    Blocks are counted through there, by stage here. The file may have more of them where the model was ``cut``.

    Returns:
        the weights, and the file's names of what is behind the cut.

    Raises:
        ValueError: another number of blocks, or a tensor that belongs to none of the known parts.
    """
    places = sorted(
        {(int(match[1]), int(match[2])) for name in ours if (match := re.match(r"blocks\.(\d+)\.(\d+)\.", name))}
    )
    count = 1 + max(int(match[1]) for key in state if (match := re.match(r"_blocks\.(\d+)\.", key)))
    is_cut = any(part.startswith("blocks.") for part in cut)
    if count < len(places) or count > len(places) and not is_cut:
        raise ValueError(
            f"has {count} blocks, the tower {len(places)}; set model.vision.name to the model of these weights"
        )
    owner = {theirs: part for part, theirs in ENDS.items()}
    for number, (stage, index) in enumerate(places):
        is_widening = f"_blocks.{number}._expand_conv.weight" in state
        parts = (WIDENING if is_widening else PLAIN) | SQUEEZE
        owner |= {f"_blocks.{number}.{theirs}": f"blocks.{stage}.{index}.{part}" for part, theirs in parts.items()}
    found, beside = {}, []
    for key, value in state.items():
        part, _, kind = key.rpartition(".")
        number = re.match(r"_blocks\.(\d+)\.", key)
        if number is not None and int(number[1]) >= len(places):
            beside.append(key)
            continue
        if part not in owner:
            raise ValueError(f"has {key}, which no EfficientNet of timm has")
        found[f"{owner[part]}.{kind}"] = value
    return found, beside


def _positions(value: Tensor, shape: torch.Size) -> Tensor:
    """A position table [.., rows, W], of some single tokens and a square grid, brought to the grid of ``shape``."""
    others = [(*one[:-2], *one[-1:]) for one in (value.shape, shape)]
    if others[0] != others[1]:
        return value
    grid = math.isqrt(shape[-2])
    singles = shape[-2] - grid * grid
    if math.isqrt(max(value.shape[-2] - singles, 0)) ** 2 != value.shape[-2] - singles:
        return value
    table = value.reshape(-1, shape[-1])
    square = resize_positions(torch.cat([table[:1], table[singles:]]), grid)[1:]
    return torch.cat([table[:singles], square]).reshape(shape)
