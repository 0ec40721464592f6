"""What a model computes of a batch, to be compared bit for bit: logits of every target, and losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.evlgen import EVLGen


class Rounding(NamedTuple):
    """What rounding the weights changes: the largest difference of a logit, the share of targets whose most probable
    class or word is another."""

    largest: float
    changed: float


@torch.no_grad()
def outputs_of(objective: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Logits by term, and the sum of losses of each ("loss of TERM"), fp32 on the host; in evaluation mode."""
    found = {f"loss of {name}": loss.float().cpu() for name, (loss, _) in objective.score(batch).items()}
    for name, logits in _logits(objective, batch).items():
        found[f"logits of {name}"] = logits.float().cpu()
    return found


def first_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first output that is not equal bit for bit, in words; None where all are."""
    if set(expected) != set(found):
        return f"outputs {', '.join(sorted(set(expected) ^ set(found)))} are of one model only"
    for name, value in expected.items():
        if found[name].shape != value.shape:
            return f"{name} has shape {tuple(found[name].shape)}, the run's {tuple(value.shape)}"
        if not torch.equal(found[name].view(torch.int32), value.view(torch.int32)):
            return f"{name} differs by up to {_largest(value, found[name]):.3g}"
    return None


def rounding(exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor]) -> Rounding:
    """What differs between the outputs of a model and of the same with rounded weights."""
    names = [name for name in exact if name.startswith("logits")]
    largest = max((_largest(exact[name], rounded[name]) for name in names), default=0.0)
    tables = [(exact[name], rounded[name]) for name in names if exact[name].ndim == 2]
    total = sum(len(one) for one, _ in tables)
    changed = sum(int((one.argmax(1) != other.argmax(1)).sum()) for one, other in tables)
    return Rounding(largest, changed / max(total, 1))


def _logits(objective: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Logits [M, V] of words, [M, C] of classes, or scores [M, C] of candidates, by term."""
    if hasattr(objective, "judge"):
        return {"classes": objective.judge(batch)[0]}
    if hasattr(objective, "scores"):
        return objective.scores(batch)
    net, found = objective.net, {}
    output = net(batch)
    for name, term in batch.terms.items():
        states = getattr(output, term.source, None)
        if states is None or term.position.ndim != 1 or term.kind not in ("token", "class"):
            continue  # its loss is compared all the same
        states = states.index_select(0, term.position)
        if term.kind == "class":
            found[name] = getattr(objective, f"{name}_head")(net.pooler(states))
        else:
            found[name] = net.language.logits(states) if isinstance(net, EVLGen) else objective.lm_head(states)
    return found


def _largest(one: Tensor, other: Tensor) -> float:
    """The largest difference of finite entries."""
    both = torch.isfinite(one) & torch.isfinite(other)
    return float((one - other)[both].abs().max()) if bool(both.any()) else 0.0
