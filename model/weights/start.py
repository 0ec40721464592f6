"""The one way in which weights get into a module: every name on either side is accounted for, or nothing is written."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.frozen import persistent_buffers
from model.vision.clip import resize_positions

Rules = tuple[tuple[str, tuple[str, ...]], ...]  # pattern of our name -> names in the source, joined along rows
Resizes = tuple[tuple[str, Callable[[Tensor, torch.Size], Tensor]], ...]  # pattern of our name -> how
SAME_NAMES: Rules = ((r"(.+)", (r"\1",)),)


@dataclass(frozen=True)
class Loaded:
    """What became of every name: ours that were ``loaded`` (some ``resized``) or are ``fresh``, theirs ``dropped``."""

    loaded: list[str]
    resized: list[str]
    fresh: list[str]  # as they were before: random, if nothing was loaded earlier
    dropped: list[str]

    def __str__(self) -> str:
        return ", ".join(f"{len(names)} {kind}" for kind, names in dataclasses.asdict(self).items() if names)


def start_from(
    module: nn.Module,
    state: Mapping[str, Tensor],
    rules: Rules = SAME_NAMES,
    source: str = "weights",
    fresh: Iterable[str] = (),
    dropped: Iterable[str] = (),
    resizes: Resizes | None = None,
) -> Loaded:
    """Copies ``state`` into the parameters and persistent buffers of ``module``.

    Args:
        module: what is written; tensors of any dtype and device.
        state: tensors by their names in the source.
        rules: which of these make up which of ours.
        source: beginning of an error, like "model.weights FOLDER".
        fresh: patterns of our names that may keep their values: the source lacks them, or has another shape.
        dropped: patterns of names in the source that the module may leave unread.
        resizes: what may have another number of rows, and how it gets ours (default: RESIZES).

    Raises:
        ValueError: a name is missing, left over or of another shape without being allowed to; nothing was written.
    """
    targets = dict(named_tensors(module))
    values, used = {}, set()
    kept, resized, shapes, missing = [], [], [], []
    for name, target in targets.items():
        foreign = foreign_names(name, rules)
        may_stay = any(re.fullmatch(pattern, name) for pattern in fresh)
        lacking = [key for key in foreign if key not in state] if foreign else [name]
        if lacking:
            if may_stay:
                kept.append(name)
            else:
                missing.append(f"{lacking[0]}, needed for {name}")
                used.update(foreign)
            continue
        try:
            value = joined(name, foreign, state)
            fitting = resize(name, value, target.shape, RESIZES if resizes is None else resizes)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        if fitting.shape != target.shape and may_stay:
            kept.append(name)
            continue
        used.update(foreign)
        if fitting.shape == target.shape:
            values[name] = fitting
            resized += [name] if fitting.shape != value.shape else []
        else:
            shapes.append(f"{foreign[0]} has shape {tuple(value.shape)}, the model's {name} {tuple(target.shape)}")
    left = sorted(set(state) - used)
    unread = [key for key in left if not any(re.fullmatch(pattern, key) for pattern in dropped)]
    if shapes or missing or unread:
        raise ValueError(f"{source}: {_refusal(shapes, missing, unread)}")
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)
    return Loaded(list(values), resized, kept, left)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name: all that a checkpoint of the module holds."""
    yield from module.named_parameters()
    yield from persistent_buffers(module)


def foreign_names(name: str, rules: Rules) -> tuple[str, ...]:
    """Names in the source that make up our ``name``; none where the source's layout does not know such a thing."""
    for pattern, foreign in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return tuple(match.expand(part) for part in foreign)
    return ()


def joined(name: str, foreign: tuple[str, ...], state: Mapping[str, Tensor]) -> Tensor:
    """The value of our ``name``, made of the tensors named in ``foreign``; raises ValueError where they do not fit."""
    missing = [key for key in foreign if key not in state]
    if missing:
        raise ValueError(f"weights lack {missing[0]}, needed for {name}; are they of this kind of model and depth?")
    parts = [state[key] for key in foreign]
    other = next((key for key in foreign if state[key].shape != parts[0].shape or not parts[0].ndim), None)
    if len(parts) > 1 and other:
        raise ValueError(
            f"{other} has shape {tuple(state[other].shape)}, {foreign[0]} {tuple(parts[0].shape)}: expected parts of"
            f" {name} of equal shape; the file is damaged or of another model"
        )
    value = torch.cat(parts) if len(parts) > 1 else parts[0]
    return value[0] if name.endswith("token_type") and value.ndim == 2 else value


def resize(name: str, value: Tensor, shape: torch.Size, resizes: Resizes) -> Tensor:
    """``value`` brought to ``shape`` where our ``name`` stands for something of any size, else as it is."""
    rule = next((rule for pattern, rule in resizes if re.fullmatch(pattern, name)), None)
    return value if rule is None or value.shape == shape else rule(value, shape)


def _image_positions(table: Tensor, shape: torch.Size) -> Tensor:
    """[1 + g*g, W] for another grid."""
    return resize_positions(table, round((shape[0] - 1) ** 0.5)) if table.shape[1:] == shape[1:] else table


def _row_per_image(table: Tensor, shape: torch.Size) -> Tensor:
    """One row for text, then one for each image: surplus images go, further images begin as the last one."""
    if table.shape[1:] != shape[1:]:
        return table
    return torch.cat([table[: shape[0]], table[-1:].expand(max(shape[0] - len(table), 0), -1)])


RESIZES: Resizes = (
    (r"(.+\.)?position_embedding", _image_positions),
    (r"net\.type_embedding\.weight", _row_per_image),
)


def _refusal(shapes: list[str], missing: list[str], unread: list[str]) -> str:
    sizes = (
        "width, patches and number of positions are options of the model, set them to the weights' sizes; the"
        " vocabulary is that of data.tokenizer, name the weights' own"
    )
    reasons = (
        ("", shapes, sizes),
        ("weights lack ", missing, "are they of this kind of model and depth?"),
        ("the model has no place for ", unread, "is it of this kind and depth?"),
    )
    return "; ".join(f"{what}{_first(names)}; {advice}" for what, names, advice in reasons if names)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
