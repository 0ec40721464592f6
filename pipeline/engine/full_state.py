"""Weights and Adam's moments of a DeepSpeed engine, whole, in fp32 and by name, at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from model.frozen import trained_buffers
from pipeline.checkpoint.files import MOMENTS, Piece
from pipeline.checkpoint.state import ReadRanges
from pipeline.distributed.places import Place
from pipeline.distributed.sharing import owners_of


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
        begin, end = self._range(parameter)
        if begin == end:
            return None, {}
        if self._stage == 3:
            return begin, {kind: _zero3_local(parameter, kind).flatten()[: end - begin] for kind in kinds}
        return begin, {kind: _fragment(parameter, kind) for kind in kinds}

    def _range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """First element and end of this rank's stretch of a parameter that ZeRO divides; equal if it has none."""
        if self._stage == 3:
            return zero3_range(parameter.ds_tensor.numel(), parameter.ds_numel, self._place.rank)
        if parameter._hp_mapping is None:
            return 0, 0
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def write(self, read: ReadRanges, optimizer_steps: int) -> None:
        """Set every master weight and moment, and Adam's step counter; the working copies follow.

        A rank reads what its optimizer holds, so that all together read each element once. What all hold alike
        (buffers, and everything at stage 0) is divided among them by name and sent. ``optimizer_steps`` 0 means that
        there are no moments to read.
        """
        if optimizer_steps or self._inner_optimizer().state:
            self._make_moments(optimizer_steps)
        if self._stage == 3:
            self._deepspeed.optimizer.checkpoint_event_prologue()  # no whole weights are left, which would be old ones
        trained = {name: value for name, value in self._objective.named_parameters() if value.requires_grad}
        for kind in ("weight", *MOMENTS) if optimizer_steps else ("weight",):
            alike = dict(trained_buffers(self._objective)) if kind == "weight" else {}
            if self._stage == 0:
                alike |= {n: p if kind == "weight" else self._moment(p, kind) for n, p in trained.items()}
            else:
                self._read_held(read, kind, trained)
            self._read_alike(read, kind, alike)
        self._refresh_working_copies()

    def _read_held(self, read: ReadRanges, kind: str, trained: Mapping[str, nn.Parameter]) -> None:
        """Set this rank's stretches of the parameters that ZeRO divides."""
        ranges = {name: self._range(parameter) for name, parameter in trained.items()}
        ranges = {name: (begin, end) for name, (begin, end) in ranges.items() if begin < end}
        values = read(kind, [(name, begin, end) for name, (begin, end) in ranges.items()])
        for name, value in zip(ranges, values, strict=True):
            if self._stage == 3:
                _set_zero3_local(trained[name], kind, value.to(self._device))
            else:
                _fragment(trained[name], kind).data.copy_(value)

    def _read_alike(self, read: ReadRanges, kind: str, alike: Mapping[str, Tensor]) -> None:
        """Set tensors that every rank holds whole: one rank reads each and sends it to all others."""
        owners = owners_of({name: target.nbytes for name, target in alike.items()}, self._place.world_size)
        own = [name for name in alike if owners[name] == self._place.rank]
        values = read(kind, [(name, 0, alike[name].numel()) for name in own])
        for name, value in zip(own, values, strict=True):
            alike[name].data.copy_(value.view(alike[name].shape))
        for name, target in alike.items() if self._place.world_size > 1 else ():
            deepspeed.comm.broadcast(target.data, src=owners[name])

    def _refresh_working_copies(self) -> None:
        """Bring the master weights to all ranks as DeepSpeed does after a step; at stage 0 they are one."""
        optimizer = self._deepspeed.optimizer
        if self._stage == 3:
            for group in range(len(optimizer.fp16_groups)):  # from masters to working copies, part by part
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()  # gathers the parameters that stay whole
        elif self._stage:
            optimizer.update_lp_params()

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


def zero3_range(size: int, whole: int, rank: int) -> tuple[int, int]:
    """First element and end of a rank's part of a flat tensor of ``whole`` elements in equal parts of ``size``."""
    begin = min(size * rank, whole)
    return begin, min(begin + size, whole)


def _fragment(parameter: nn.Parameter, kind: str) -> Tensor:
    """The stretch of a parameter that this rank's optimizer has, at DeepSpeed's stages 1 and 2."""
    return parameter._hp_mapping.get_hp_fragment(None if kind == "weight" else kind)


def _zero3_local(parameter: nn.Parameter, kind: str) -> Tensor:
    if kind == "weight":
        return safe_get_local_fp32_param(parameter)
    return safe_get_local_optimizer_state(parameter, kind)


def _set_zero3_local(parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """Set this rank's part of a parameter, fp32, padded with zeros where it is the last."""
    part = torch.zeros(parameter.ds_tensor.numel(), dtype=torch.float32, device=value.device)
    part[: value.numel()] = value
    if kind == "weight":
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, kind)


def _on_host(value: Tensor, copy: bool) -> Tensor:
    """``value`` in host memory; ``copy`` where it is the live tensor and not one made for the caller."""
    return value.detach().to("cpu", copy=copy).contiguous()
