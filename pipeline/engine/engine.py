"""The one place that drives DeepSpeed: forward, backward, optimizer steps."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from model.batch import Batch
from model.frozen import persistent_buffers
from pipeline.checkpoint.files import Piece
from pipeline.checkpoint.restore import describe_frozen
from pipeline.checkpoint.state import ReadRanges
from pipeline.config.options import OptimConfig, TrainConfig
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.engine.forward_timer import ForwardTimer
from pipeline.engine.full_state import FullState
from pipeline.engine.optim import build_adamw, learning_rate, parameter_groups, set_learning_rate
from pipeline.engine.veto import StepVeto
from pipeline.incidents.guard import Guard, Verdict
from pipeline.incidents.module_statistics import module_statistics

T = TypeVar("T")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class BadStep:
    """What is known of a step that was not taken; the same on every rank but for ``micro_sums``."""

    verdict: Verdict
    loss: float
    terms: dict[str, float]  # mean of each term over all ranks
    grad_norm: float | None
    micro_sums: list[dict[str, float]]  # this rank's loss sums, one entry per micro-batch
    dropout_seeds: list[int]
    modules: dict[str, dict[str, float]]


@dataclass
class StepResult:
    """One optimizer step. Loss sums are this rank's, on the device; counts are of all ranks, on the host."""

    loss_sums: dict[str, Tensor]
    counts: dict[str, int]
    learning_rate: float
    grad_norm: float | Tensor | None
    taken: bool = True  # False: weights, moments and Adam's counter are those from before
    votes: list[float] = field(default_factory=list)  # sums over all ranks
    bad: BadStep | None = None  # set where the guard refused the step; fp16's search for a loss scale is none of it


class _Pass(nn.Module):
    """Sends everything that uses the weights through one forward, because ZeRO-3 gathers them around forward only."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.objective, *arguments)


def _losses(objective: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return objective(batch)


class TrainEngine:
    """A DeepSpeed engine around an objective, with our parameter groups, schedule and loss normalisation."""

    def __init__(
        self,
        objective: nn.Module,
        ds_config: dict[str, Any],
        optim: OptimConfig,
        train: TrainConfig,
        place: Place,
        agreement: Agreement,
    ) -> None:
        _quiet_deepspeed(place.is_main)
        self.term_weights: Mapping[str, float] = objective.term_weights
        self.accumulation = ds_config["gradient_accumulation_steps"]
        self.stage = ds_config["zero_optimization"]["stage"]
        self.precision = next((name for name in HALVES if ds_config[name]["enabled"]), "fp32")
        self._optim, self._train, self._place, self._agreement = optim, train, place, agreement
        self.frozen = agreement.gather(describe_frozen(objective) if place.is_main else None)[0]
        groups = parameter_groups(objective.named_parameters(), objective.parameter_group, objective.decays, optim)
        module = _Pass(objective)
        if self.stage == 3 and place.world_size > 1:
            _divide(objective, ds_config)
        with _zero_at_stage_1():
            self._deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=build_adamw(groups, optim), config=ds_config, dist_init_required=False
            )
        for _, buffer in persistent_buffers(objective) if place.world_size > 1 else ():
            torch.distributed.broadcast(buffer.data, src=0)  # which DeepSpeed does for parameters only
        self._full_state = FullState(self._deepspeed, objective, self.stage, place)
        self._veto = StepVeto(self._deepspeed.optimizer, self.stage)
        self.forward_timer = ForwardTimer(self.device)
        if train.compile:
            self._deepspeed.compile()

    @property
    def device(self) -> torch.device:
        return torch.device(self._deepspeed.device)

    @property
    def objective(self) -> nn.Module:
        return self._deepspeed.module.objective

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were left out: refused by the guard, or by DeepSpeed for a gradient not finite."""
        return self._deepspeed.skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, number: int) -> None:
        self._deepspeed.skipped_steps = number

    def step(
        self,
        step: int,
        micro_batches: Sequence[Batch],
        guard: Guard | None = None,
        votes: Callable[[], Sequence[float]] = tuple,
    ) -> StepResult:
        """Optimizer step number ``step`` (0-based) over this rank's micro-batches.

        Loss = sum over terms of weight * sum over all ranks and micro-batches / their global count; a term without
        targets contributes 0. The engine divides by ranks and micro-batches, which the factor undoes. With a ``guard``
        the step is judged, and the device waited for, once: before the optimizer. Nothing else here waits. ``votes``
        is called once, late in the step, for numbers of this rank whose sums over all ranks the result brings.
        """
        assert len(micro_batches) == self.accumulation, (len(micro_batches), self.accumulation)
        counts = self._global_counts(micro_batches)
        undo = self._place.world_size * self.accumulation
        factors = {name: self.term_weights[name] * undo / max(count, 1) for name, count in counts.items()}
        base = learning_rate(step, self._train.steps, self._optim)
        set_learning_rate(self._deepspeed.optimizer.param_groups, base)
        self._deepspeed.train()
        result = StepResult({}, counts, base, None)
        micro_sums: list[dict[str, Tensor]] = []
        skipped_before = self._deepspeed.skipped_steps
        for index, batch in enumerate(micro_batches):
            torch.manual_seed(self._dropout_seed(step, index))
            with self.forward_timer.measure():
                sums = self._deepspeed(_losses, batch.to(self.device))
            loss = sum(factors[name] * value for name, value in sums.items())
            self._deepspeed.backward(loss)
            micro_sums.append({name: value.detach() for name, value in sums.items()})
            if index == self.accumulation - 1:
                if guard is not None:
                    self._veto.ask = partial(self._judge, guard, step, micro_sums, votes, result)
                if self.stage == 0:
                    result.grad_norm = self._stage0_grad_norm()
                    self._veto.ask_at_stage_0(result.grad_norm)
            self._deepspeed.step()
        for sums in micro_sums:
            for name, value in sums.items():
                result.loss_sums[name] = result.loss_sums[name] + value if name in result.loss_sums else value
        result.taken = self._deepspeed.skipped_steps == skipped_before
        if result.bad is not None:
            result.grad_norm = result.bad.grad_norm
        elif self.stage > 0:
            result.grad_norm = self._deepspeed.get_global_grad_norm()
        assert self._veto.ask is None, "DeepSpeed stepped without asking; is it another version than pinned?"
        if guard is None:
            own = votes()
            result.votes = self._agreement.total(own) if own else []
        return result

    def _judge(
        self,
        guard: Guard,
        step: int,
        micro_sums: list[dict[str, Tensor]],
        votes: Callable[[], Sequence[float]],
        result: StepResult,
        norm: float | None,
        overflow: bool,
    ) -> bool:
        """Whether the step may be taken, agreed by all ranks; evidence goes to ``result`` if not."""
        sums = _numbers(micro_sums)  # waits for the device
        names = sorted(self.term_weights)
        if overflow:
            norm = math.inf
        local = [sum(row.get(name, 0.0) for row in sums) for name in names]
        own_norm = norm if norm is not None and self._place.is_main else 0.0
        norm_sum, *totals = self._agreement.total([own_norm, *local, *votes()])
        result.votes = totals[len(names) :]
        norm = None if norm is None else norm_sum  # rank 0's, so that a rounding never divides the ranks
        terms = {
            name: total / result.counts[name] for name, total in zip(names, totals, strict=False) if result.counts[name]
        }
        loss = sum(self.term_weights[name] * mean for name, mean in terms.items())
        if overflow and self.precision == "fp16" and math.isfinite(loss):
            return True  # DeepSpeed leaves the step out and lowers the loss scale
        verdict = guard.judge(step, loss, norm)
        if verdict.reason is None:
            return True
        seeds = [self._dropout_seed(step, index) for index in range(self.accumulation)]
        modules = module_statistics(self._whole_gradients())
        result.bad = BadStep(verdict, loss, terms, norm, sums, seeds, modules)
        return False

    def _whole_gradients(self) -> Iterator[tuple[str, Tensor | None, Tensor]]:
        """(name, gradient of the whole step, master weight) of each trainable parameter; every rank must iterate.

        Good between the last backward pass and the optimizer.
        """
        scale = float(getattr(self._deepspeed.optimizer, "loss_scale", 1.0))
        for name, parameter in self.objective.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.stage == 0:
                gradient = parameter.grad
            elif self.stage == 3:
                gradient = parameter._z3_optimizer.get_fp32_grad_for_param(parameter)
            else:  # not safe_get_full_grad, which prefers what this rank alone has
                gradient = parameter.get_full_hp_grad()
            yield name, gradient if gradient is None else gradient / scale, self._full_state.master(parameter)

    @contextmanager
    def scoring(self) -> Iterator[Callable[[Callable[[nn.Module, Batch], Any], Batch], Any]]:
        """Runs functions of (objective, batch) in evaluation mode and without gradients; training mode restored after.

        Every rank must run as many: at ZeRO-3 parameters are gathered on the way.
        """
        with self._evaluating():
            yield lambda function, batch: self._deepspeed(function, batch.to(self.device))

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function(objective, *arguments)`` in evaluation mode without gradients, training mode restored after.

        It runs inside the engine's forward, uncompiled: whatever the function computes by calling modules works at
        every ZeRO stage. At ZeRO-3 every rank must run it, and call the same modules equally often in the same order.
        """
        found: list[T] = []  # carries the result past the hooks of ZeRO-3, which know few types

        def call(objective: nn.Module) -> None:
            found.append(function(objective, *arguments))

        with self._evaluating(), torch.compiler.set_stance("force_eager"):
            self._deepspeed(call)
        return found[0]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._deepspeed.train()

    def shapes(self, kind: str, has_moments: bool) -> dict[str, tuple[int, ...]]:
        return self._full_state.shapes(kind, has_moments)

    def named_state(self, keep: Container[str] | None = None) -> Iterator[tuple[str, dict[str, Tensor]]]:
        return self._full_state.read(keep)

    def pieces(self, owned: Container[str]) -> Iterator[Piece]:
        return self._full_state.pieces(owned)

    def load_named_state(self, read: ReadRanges, optimizer_steps: int) -> None:
        self._full_state.write(read, optimizer_steps)

    @property
    def optimizer_steps(self) -> int:
        """Steps that Adam has taken; skipped ones do not count."""
        return self._full_state.optimizer_steps

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """State of fp16's dynamic loss scaler, None in other precisions."""
        if self.precision != "fp16":
            return None
        scaler = self._deepspeed.optimizer.loss_scaler
        return {key: value for key, value in vars(scaler).items() if isinstance(value, (int, float))}

    @loss_scale.setter
    def loss_scale(self, state: dict[str, float] | None) -> None:
        if state is not None and self.precision == "fp16":
            vars(self._deepspeed.optimizer.loss_scaler).update(state)

    def _global_counts(self, micro_batches: Sequence[Batch]) -> dict[str, int]:
        names = sorted(self.term_weights)
        local = [sum(batch.counts.get(name, 0) for batch in micro_batches) for name in names]
        return {name: int(total) for name, total in zip(names, self._agreement.total(local), strict=True)}

    def _dropout_seed(self, step: int, index: int) -> int:
        """Seed of one micro-batch's dropout: a function of its place in the sample order, so none is saved."""
        slot = index * self._place.world_size + self._place.rank
        return ((self._train.seed * 1_000_003 + step) * 65_537 + slot) % (1 << 63)

    def _stage0_grad_norm(self) -> Tensor:
        grads = [parameter.grad for parameter in self.objective.parameters() if parameter.grad is not None]
        return nn.utils.get_total_norm(grads)


def prepare_deepspeed(device: torch.device) -> None:
    """Settings of the library that must precede its first use in a process."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")  # its calls
    if device.type == "cpu":  # the shared-memory collective is compiled at first use, half a minute for nothing
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)


def build_device(ds_config: dict[str, Any], place: Place) -> torch.device:
    """Where a model is to be built for ``TrainEngine``: ``with build_device(...): objective = ...``

    At ZeRO-3 rank 0 alone builds it with values, the others only know its shapes: the engine sends them their parts.
    """
    whole = place.is_main or ds_config["zero_optimization"]["stage"] < 3
    return torch.device("cpu" if whole else "meta")


def _divide(objective: nn.Module, ds_config: dict[str, Any]) -> None:
    """Send rank 0's parameters to all ranks, one at a time: each rank has its part of all and one of them whole."""
    dtype = next((dtype for name, dtype in HALVES.items() if ds_config[name]["enabled"]), torch.float32)

    class OneAtATime(nn.Module):
        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            for parameter in objective.parameters():
                if parameter.is_meta:
                    empty = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
                    vars(empty).update(vars(parameter))
                    torch.utils.swap_tensors(parameter, empty)
                parameter.data = parameter.data.to(dtype)
                yield parameter  # divided when the next one is asked for

    deepspeed.zero.Init(module=OneAtATime(), config_dict_or_path=ds_config)
    device = get_accelerator().current_device_name()
    for module in objective.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                held = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
                module._buffers[name] = held.contiguous()
                torch.distributed.broadcast(module._buffers[name].view(-1).view(torch.uint8), src=0)


@contextmanager
def _zero_at_stage_1() -> Iterator[None]:
    """Inside, DeepSpeed takes its ZeRO optimizer at stage 1 in bf16 too, as it does in fp16 and at all other stages.

    0.19.8 has another one for bf16 with fp32 accumulation, which knows no step that is left out.
    """
    choose = deepspeed.DeepSpeedEngine._do_optimizer_sanity_check

    def choose_zero(engine: deepspeed.DeepSpeedEngine, optimizer: torch.optim.Optimizer) -> str | None:
        found = choose(engine, optimizer)
        return "zero_optimization" if engine.zero_optimization() else found

    deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = choose_zero
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = choose


def _numbers(rows: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    """Scalars on the device as numbers, by one transfer."""
    flat = [value.double() for row in rows for value in row.values()]
    values = iter(torch.stack(flat).tolist() if flat else [])
    return [{name: next(values) for name in row} for row in rows]


def _quiet_deepspeed(is_main: bool) -> None:
    deepspeed.utils.logger.setLevel(logging.WARNING if is_main else logging.ERROR)
