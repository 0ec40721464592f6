"""Weights and Adam's moments of a DeepSpeed engine, whole, in fp32 and by name, at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import nullcontext

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from model.frozen import trained_buffers
from pipeline.checkpoint.files import MOMENTS, Piece
from pipeline.distributed.places import Place


class FullState:
    """Reads and sets the state of ``engine``, which trains ``objective``; every rank must make every call."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, objective: nn.Module, stage: int, place: Place) -> None:
        self._deepspeed, self._objective, self._stage, self._place = engine, objective, stage, place
        self._device = torch.device(engine.device)

    def shapes(self, kind: str, has_moments: bool) -> dict[str, tuple[int, ...]]:
        """Shape by name of every tensor that a checkpoint holds of ``kind``: "weight" or a moment.

        Frozen parts are not among them (``frozen`` refers to them), persistent buffers of all others are.
        """
        trainable = {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self._objective.named_parameters()
            if parameter.requires_grad
        }
        if kind != "weight":
            return trainable if has_moments else {}
        return trainable | {name: tuple(buffer.shape) for name, buffer in trained_buffers(self._objective)}

    def read(self, keep: Container[str] | None = None) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(name, {"weight", "exp_avg", "exp_avg_sq"}) in fp32, whole, on the host; every rank must iterate.

        Frozen parts are left out, persistent buffers come with their weight only, in their own dtype. Moments
        are there once a step was taken. A rank takes part in gathering the names that it does not ``keep`` (None keeps
        all), and gets an empty dict for them.
        """
        has_moments = self.optimizer_steps > 0
        if has_moments:
            self._link_moments()
        for name, parameter in self._objective.named_parameters():
            if parameter.requires_grad:
                kept: dict[str, Tensor] = {}
                for kind in ("weight", *MOMENTS) if has_moments else ("weight",):
                    value = self.master(parameter) if kind == "weight" else self._moment(parameter, kind)
                    if keep is None or name in keep:
                        kept[kind] = _on_host(value, copy=self._stage == 0)
                yield name, kept
        for name, buffer in trained_buffers(self._objective):
            yield name, {"weight": _on_host(buffer, copy=True)} if keep is None or name in keep else {}

    def pieces(self, owned: Container[str]) -> Iterator[Piece]:
        """What a checkpoint gets from this rank: copies on the host, made without a word to other ranks.

        Where ZeRO divides the state, this rank's stretch of every trainable parameter; what every rank holds alike
        (buffers, and everything at stage 0) if its name is ``owned``.
        """
        has_moments = self.optimizer_steps > 0
        if has_moments:
            self._link_moments()
        kinds = ("weight", *MOMENTS) if has_moments else ("weight",)
        for name, parameter in self._objective.named_parameters():
            if not parameter.requires_grad or (self._stage == 0 and name not in owned):
                continue
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            begin, held = self._held(parameter, kinds)
            if begin is not None:
                yield Piece(name, begin, shape, {kind: _on_host(value, copy=True) for kind, value in held.items()})
        for name, buffer in trained_buffers(self._objective):
            if name in owned:
                yield Piece(name, 0, tuple(buffer.shape), {"weight": _on_host(buffer, copy=True)})

    def _held(self, parameter: nn.Parameter, kinds: Iterable[str]) -> tuple[int | None, dict[str, Tensor]]:
        """Where this rank's stretch of a parameter begins, None if it has none, and its tensors by kind."""
        if self._stage == 0:
            return 0, {kind: parameter if kind == "weight" else self._moment(parameter, kind) for kind in kinds}
        if self._stage == 3:
            size, whole = parameter.ds_tensor.numel(), parameter.ds_numel
            begin = min(size * self._place.rank, whole)
            end = min(begin + size, whole)
            local = {kind: _zero3_local(parameter, kind) for kind in kinds} if begin < end else {}
            return begin if begin < end else None, {kind: held.flatten()[: end - begin] for kind, held in local.items()}
        mapping = parameter._hp_mapping  # of DeepSpeed's stages 1 and 2: which stretch of it this rank's optimizer has
        if mapping is None:
            return None, {}
        held = {kind: mapping.get_hp_fragment(None if kind == "weight" else kind) for kind in kinds}
        return mapping.lp_fragment_address.start, held

    def write(self, read: Callable[[str, str], Tensor], optimizer_steps: int) -> None:
        """Set every master weight and moment from ``read(key, parameter name)``, and Adam's step counter.

        ``optimizer_steps`` 0 means that there are no moments to read. The working copies are set too.
        """
        if optimizer_steps or self._inner_optimizer().state:
            self._make_moments(optimizer_steps)
        for name, parameter in self._objective.named_parameters():
            if not parameter.requires_grad:
                continue
            weight = read("weight", name)
            self._set(parameter, weight, None)
            for key in MOMENTS if optimizer_steps else ():
                self._set(parameter, read(key, name), key)
            with self._whole(parameter):
                parameter.data.copy_(weight)
        for name, buffer in trained_buffers(self._objective):
            buffer.data.copy_(read("weight", name))

    @property
    def optimizer_steps(self) -> int:
        """Steps that Adam has taken; skipped ones do not count."""
        states = self._inner_optimizer().state.values()
        return int(next((state["step"] for state in states if "step" in state), 0))

    def _inner_optimizer(self) -> torch.optim.AdamW:
        optimizer = self._deepspeed.optimizer
        return optimizer if self._stage == 0 else optimizer.optimizer

    def _flat_masters(self) -> list[Tensor]:
        """The tensors that the inner optimizer steps on this rank."""
        if self._stage == 0:
            return [parameter for group in self._inner_optimizer().param_groups for parameter in group["params"]]
        optimizer = self._deepspeed.optimizer
        return optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups

    def _make_moments(self, optimizer_steps: int) -> None:
        """Give the inner optimizer the state that it makes by itself only at its first step."""
        state = self._inner_optimizer().state
        for flat in self._flat_masters():
            state[flat] = {key: torch.zeros_like(flat) for key in MOMENTS}
            state[flat]["step"] = torch.tensor(float(optimizer_steps), dtype=torch.float32, device=flat.device)
        self._link_moments()

    def _link_moments(self) -> None:
        """Let the ``safe_*`` functions see every group's moments.

        DeepSpeed 0.19.8 links them once, after the first group's first step, when the other groups have none yet.
        """
        if self._stage in (1, 2):
            self._deepspeed.optimizer._hp_optimizer_states_linked = False
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 weight that the optimizer steps, whole; every rank must ask."""
        return parameter if self._stage == 0 else safe_get_full_fp32_param(parameter)

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        if self._stage == 0:
            return self._inner_optimizer().state[parameter][key]
        return safe_get_full_optimizer_state(parameter, key)

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Set a master weight (``key`` None) or moment from its whole value; each rank takes its part."""
        if self._stage == 0:
            target = parameter if key is None else self._inner_optimizer().state[parameter][key]
            target.data.copy_(value)
        elif self._stage == 3:
            part = _zero3_part(value.to(self._device), parameter, self._place)
            if key is None:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, value.to(self._device))
        else:
            safe_set_full_optimizer_state(parameter, value.to(self._device), key)

    def _whole(self, parameter: nn.Parameter):
        """Inside, the working copy is whole; changes made on every rank alike are kept."""
        if self._stage != 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _zero3_local(parameter: nn.Parameter, kind: str) -> Tensor:
    if kind == "weight":
        return safe_get_local_fp32_param(parameter)
    return safe_get_local_optimizer_state(parameter, kind)


def _zero3_part(value: Tensor, parameter: nn.Parameter, place: Place) -> Tensor:
    """This rank's share of a whole value: equal parts of the flat value, the last padded with zeros."""
    size = parameter.ds_tensor.numel()
    flat = value.flatten()
    part = flat.new_zeros(size)
    begin = min(size * place.rank, flat.numel())
    end = min(begin + size, flat.numel())
    part[: end - begin] = flat[begin:end]
    return part


def _on_host(value: Tensor, copy: bool) -> Tensor:
    """``value`` in host memory; ``copy`` where it is the live tensor and not one made for the caller."""
    return value.detach().to("cpu", copy=copy).contiguous()
