"""LoRA: a trained low-rank update beside frozen linear layers of a language model (Hu et al. 2021, arXiv 2106.09685).

Written here instead of taken from peft, which renames the layers that it adapts: here a frozen weight keeps its name,
by which checkpoints refer to it, and layers are built on the meta device like all others (ZeRO-3).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from model.config import LanguageConfig
from model.dropout import dropout
from model.frozen import unfreeze
from model.learning_rate_groups import declare_group

ADAPTER = r".+\.adapter\.(down|up)\.weight"  # pattern of the names of what is trained


class AdaptedLinear(nn.Linear):
    """A linear layer y = Wx + b to which its ``adapter`` adds; weight and bias keep their names."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, rate: float) -> None:
        """Takes over weight and bias of ``linear``."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.adapter = Adapter(linear.in_features, linear.out_features, rank, alpha, rate)
        self.train(linear.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return super().forward(inputs) + self.adapter(inputs)


class Adapter(nn.Module):
    """alpha / rank * up(down(dropout(x))); ``up`` begins as zeros, so that nothing is added (section 4.1)."""

    def __init__(self, num_inputs: int, num_outputs: int, rank: int, alpha: float, rate: float) -> None:
        super().__init__()
        self.scale, self.dropout = alpha / rank, rate
        self.down = nn.Linear(num_inputs, rank, bias=False)
        self.up = nn.Linear(rank, num_outputs, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))  # as LoRA's authors begin it
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.training and self.dropout:
            inputs = dropout(inputs, self.dropout)
        return self.up(self.down(inputs)) * self.scale


def check_lora(config: LanguageConfig) -> None:
    """Raises ValueError for an option out of its range, or one without effect."""
    default = LanguageConfig()
    if not config.lora_rank:
        idle = [name for name in ("lora_alpha", "lora_dropout", "lora_modules") if _differs(config, default, name)]
        if idle:
            raise ValueError(
                f"model.language.{idle[0]} has no effect with model.language.lora_rank 0; give a rank, or leave it out"
            )
    expected = {
        "lora_rank": (config.lora_rank >= 0, "0 or more"),
        "lora_alpha": (0 < config.lora_alpha < float("inf"), "a number above 0"),
        "lora_dropout": (0 <= config.lora_dropout < 1, "0 to below 1"),
        "lora_modules": (bool(config.lora_modules), "names of linear layers, like [q_proj, v_proj]"),
    }
    for name, (holds, wanted) in expected.items():
        if not holds:
            raise ValueError(f"model.language.{name} is {getattr(config, name)}, expected {wanted}")


def add_adapters(body: nn.Module, config: LanguageConfig) -> list[str]:
    """Adapts the linear layers of ``body`` whose name, or its end behind a dot, is one of ``lora_modules``.

    ``body`` is that of a language model alone, so that neither a vision tower nor a head is reached.

    Returns:
        names of the layers that were adapted, in the order of the model.

    Raises:
        ValueError: one of ``lora_modules`` is the name of no linear layer.
    """
    linear = {name: module for name, module in body.named_modules() if isinstance(module, nn.Linear)}
    unmatched = [one for one in config.lora_modules if not any(_is_called(name, one) for name in linear)]
    if unmatched:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear)) or "none"
        raise ValueError(
            f"model.language.lora_modules: no linear layer of model.language.name {config.name} is called"
            f" {unmatched[0]}; expected of {known}"
        )
    adapted = [name for name in linear if any(_is_called(name, one) for one in config.lora_modules)]
    for name in adapted:
        parent, _, last = name.rpartition(".")
        layer = AdaptedLinear(linear[name], config.lora_rank, config.lora_alpha, config.lora_dropout)
        setattr(body.get_submodule(parent), last, layer)
    return adapted


def train_adapters(body: nn.Module) -> None:
    """Takes the adapters of a frozen language model back into training, in the learning-rate group "head"."""
    for adapter in adapters_of(body):
        unfreeze(adapter)
        declare_group("head", adapter)


def adapters_of(body: nn.Module) -> list[Adapter]:
    """The adapters of a model, none where it is as it was."""
    return [module for module in body.modules() if isinstance(module, Adapter)]


def adapter_macs(body: nn.Module) -> int:
    """Multiply-accumulates of all adapters for one token."""
    return sum(one.down.weight.numel() + one.up.weight.numel() for one in adapters_of(body))


def _is_called(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _differs(config: LanguageConfig, default: LanguageConfig, name: str) -> bool:
    return getattr(config, name) != getattr(default, name)
