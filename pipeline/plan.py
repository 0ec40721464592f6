"""Says what fits and what it costs: python -m pipeline.plan --recipe flm_base_4m --gpus 64 --gpu-memory 80

Takes every option of training besides its own: --optim.micro_batch_size, --model.activation_checkpointing and
--deepspeed fix what would be chosen otherwise. Reads no data, needs no GPU and no memory for the weights. What the
figures are made of, and which of them are measured: docs/scaling.md.

Exit codes: 0 done, 2 a wrong command line, or nothing fits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NoReturn

from torch import nn

from data_prep.program import run_program
from pipeline.config.command_line import DS_CONFIGS, Launch
from pipeline.config.options import ConfigError, fail, in_batch_negatives
from pipeline.config.program_options import number, whole_number
from pipeline.deepspeed_json.ds_config import Device, read_ds_config, resolve
from pipeline.dry_run.counting import counted, known_vocabulary, valueless
from pipeline.engine.peak_flops import peak_flops
from pipeline.finetuning.table import task_of
from pipeline.planning import configurations as search
from pipeline.planning.configurations import Choice, Configuration
from pipeline.planning.counts import TEXT_TOKENS, Work, count_parameters
from pipeline.planning.memory import zero_of
from pipeline.planning.speed import Machine
from pipeline.planning.summary import GIB, Subject, as_plain, as_text
from pipeline.weights.packaged import parse_settings

COUNTED = 16, 64  # samples of the two micro-batches that others are told from
OFFERED = ("zero1", "zero2", "zero3", "zero0", "zero2_offload", "zero3_offload")  # of ds_configs/
MACHINE = Machine()


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    try:
        options, training = parser().parse_known_args(sys.argv[1:] if argv is None else argv)
        machine, launch = machine_of(options), parse_settings(training)
        named = any(word.split("=")[0] == "--deepspeed" for word in training)
        run = CountedRun(launch, options, [launch.deepspeed] if named else [DS_CONFIGS / f"{n}.json" for n in OFFERED])
        found = run.configurations(machine)
        best = run.best(found, machine)
        if best is None:
            raise ConfigError(nothing_fits(found, options, machine))
        subject = Subject(launch, run.words, run.parameters, options.gpus, options.gpu_memory, machine)
        shown = [best if one.choice == best.choice else one for one in search.largest_by_kind(found)]
        print(json.dumps(as_plain(subject, best, shown), indent=1) if options.json else as_text(subject, best, shown))
    except ValueError as error:
        return fail(error)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}")


def parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m pipeline.plan",
        description="Which configuration of a recipe fits so many GPUs, and what it costs.",
        epilog="All options of training: python pipeline/train.py --help",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=whole_number(), required=True, help="GPUs, one rank each")
    parser.add_argument("--gpu-memory", type=number(), required=True, metavar="GIB", help="memory of a GPU in GiB")
    parser.add_argument("--nodes", type=whole_number(), help="nodes (default: GPUs over GPUs of a node)")
    parser.add_argument("--gpus-per-node", type=whole_number(), help="GPUs of a node (default 8, or all)")
    parser.add_argument("--node-memory", type=number(), metavar="GIB", help="memory of a node; unknown: not checked")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    constants = parser.add_argument_group("constants of the machine (docs/scaling.md says where they are from)")
    constants.add_argument("--gpu", default="H100", metavar="NAME", help="its peak rate in bf16 (default H100)")
    constants.add_argument("--reached", type=number(), default=0.45, help="share of that in matrix products (0.45)")
    constants.add_argument("--memory-bandwidth", type=number(), metavar="GB/s", help="of a GPU (2680)")
    constants.add_argument("--node-bandwidth", type=number(), metavar="GB/s", help="of a GPU to its node (360)")
    constants.add_argument("--network-bandwidth", type=number(), metavar="GB/s", help="of a GPU to other nodes (40)")
    constants.add_argument("--cores-per-gpu", type=whole_number(), help="CPU cores for each GPU (12)")
    constants.add_argument("--disk-bandwidth", type=number(), metavar="GB/s", help="that all ranks write with (5)")
    text = "mean tokens of a text with both ends (12, Conceptual Captions)"
    constants.add_argument("--text-tokens", type=number(), default=TEXT_TOKENS, metavar="N", help=text)
    return parser


def machine_of(options: argparse.Namespace) -> Machine:
    """The constants that the command line names, the others as they are.

    Raises:
        ConfigError: nodes that do not hold so many GPUs, or a GPU whose rate is not known.
    """
    per_node = options.gpus_per_node or (-(-options.gpus // options.nodes) if options.nodes else min(8, options.gpus))
    nodes = options.nodes or -(-options.gpus // per_node)
    if nodes * per_node != options.gpus:
        raise ConfigError(
            f"--gpus {options.gpus} is not {nodes} nodes of {per_node} GPUs; give --nodes and --gpus-per-node whose"
            f" product it is, or --gpus {max(options.gpus // per_node, 1) * per_node}"
        )
    peak = peak_flops(options.gpu, "bf16") or peak_flops(options.gpu, "fp16")
    if peak is None:
        raise ConfigError(
            f"--gpu {options.gpu}: its peak rate is not known; name H100, H200, A100, L40S, V100 or alike"
        )
    given = {
        "memory_bandwidth": options.memory_bandwidth,
        "node_bandwidth": options.node_bandwidth,
        "network_bandwidth": options.network_bandwidth,
        "disk_bandwidth": options.disk_bandwidth,
    }
    numbers = {name: value * 1e9 for name, value in given.items() if value}
    if options.cores_per_gpu:
        numbers["cores_per_rank"] = options.cores_per_gpu
    rates = {"flops": options.reached * peak, "fp32_flops": options.reached * peak_flops(options.gpu, "fp32")}
    return dataclasses.replace(MACHINE, ranks_per_node=per_node, **rates, **numbers)


class CountedRun:
    """A run to be planned, with its counts; a micro-batch is counted once for each precision."""

    def __init__(self, launch: Launch, options: argparse.Namespace, deepspeed: Sequence[Path]) -> None:
        self.launch, self.options, self.config, self.deepspeed = launch, options, launch.config, deepspeed
        self.vocabulary, self.words = known_vocabulary(self.config)
        self.task = task_of(self.config)
        self.objective, self.counted = cache(self._objective), cache(self._counted)
        self.parameters = count_parameters(self.objective("fp32", False))

    def _objective(self, precision: str, recomputes: bool) -> nn.Module:
        model = dataclasses.replace(self.config.model, activation_checkpointing=recomputes)
        return valueless(dataclasses.replace(self.config, model=model), self.vocabulary, precision)

    def _counted(self, precision: str, recomputes: bool, samples: int) -> Work:
        return counted(self.objective(precision, recomputes), self.config, samples, self.options.text_tokens)

    def choices(self) -> list[Choice]:
        """All that may be chosen; what the command line names stays.

        Raises:
            ConfigError: the GPUs do not divide the batch, or no DeepSpeed JSON goes with the options.
        """
        named = {option for option, source in self.launch.sources.items() if source == "command line"}
        sizes = search.micro_batch_sizes(self.config.optim.batch_size, self.options.gpus)
        if "optim.micro_batch_size" in named or in_batch_negatives(self.config) is not None:  # part of what is computed
            sizes = [self.config.optim.micro_batch_size]
        recomputing = [False, True]
        if "model.activation_checkpointing" in named:
            recomputing = [self.config.model.activation_checkpointing]
        device = Device("cuda", has_bf16=peak_flops(self.options.gpu, "bf16") is not None)
        found: list[Choice] = []
        problems: list[ConfigError] = []
        for path in self.deepspeed:
            for size in sizes:
                optim = dataclasses.replace(self.config.optim, micro_batch_size=size)
                config = dataclasses.replace(self.config, optim=optim)
                try:
                    resolved = resolve(read_ds_config(path), config, self.options.gpus, device)
                except ConfigError as error:
                    problems.append(error)
                    continue
                precision = next((name for name in ("bf16", "fp16") if resolved[name]["enabled"]), "fp32")
                steps, zero = resolved["gradient_accumulation_steps"], zero_of(resolved)
                found += [Choice(path.name, precision, zero, size, steps, one) for one in recomputing]
        if not found:
            raise problems[0]
        return found

    def configurations(self, machine: Machine) -> list[Configuration]:
        """All choices with what they cost, told from micro-batches of two sizes; fp32 beside a half precision as twice
        that, which is an upper bound."""
        choices = self.choices()
        sizes = sorted({choice.micro_batch_size for choice in choices})
        high = next((size for size in sizes if size >= COUNTED[1]), sizes[-1])
        low = max((size for size in sizes if size < high and size <= COUNTED[0]), default=high)
        half = next((choice.precision for choice in choices if choice.precision != "fp32"), None)

        def work_of(choice: Choice) -> Work:
            doubled = choice.precision == "fp32" and half is not None
            precision = half if doubled else choice.precision
            counts = (self.counted(precision, choice.recomputes, size) for size in (low, high))
            work = search.between(*counts, choice.micro_batch_size)
            return search.in_fp32(work) if doubled else work

        return self._cost(choices, work_of, machine)

    def best(self, found: Sequence[Configuration], machine: Machine) -> Configuration | None:
        """The fastest that fits, counted from its own micro-batch; None if none does."""
        left = list(found)

        def work_of(choice: Choice) -> Work:
            return self.counted(choice.precision, choice.recomputes, choice.micro_batch_size)

        while (best := search.fastest(left)) is not None:
            (exact,) = self._cost([best.choice], work_of, machine)
            if exact.fits:
                return exact
            left.remove(best)
        return None

    def _cost(
        self, choices: Sequence[Choice], work_of: Callable[[Choice], Work], machine: Machine
    ) -> list[Configuration]:
        options = self.options
        host = None if options.node_memory is None else round(options.node_memory * GIB)
        gpu, saving = round(options.gpu_memory * GIB), self.config.train.async_save
        return search.configurations(
            choices, self.parameters, work_of, options.gpus, gpu, machine, host_bytes=host, async_save=saving
        )


def nothing_fits(found: Sequence[Configuration], options: argparse.Namespace, machine: Machine) -> str:
    """Why nothing fits and what would."""
    least = search.smallest(found)
    choice, memory = least.choice, least.memory
    way = (
        f"{choice.deepspeed} with a micro-batch of {choice.micro_batch_size}"
        f"{' and activation checkpointing' if choice.recomputes else ''}"
    )
    if memory.peak <= options.gpu_memory * GIB:
        needed = sum(memory.host.values()) * min(options.gpus, machine.ranks_per_node) / GIB
        return f"nothing fits --node-memory {options.node_memory:g} GiB; {way} needs {math.ceil(needed)} GiB of a node"
    return (
        f"nothing fits {options.gpus} GPUs of {options.gpu_memory:g} GiB: the least is {memory.peak / GIB:.1f} GiB, by"
        f" {way}; give --gpu-memory {math.ceil(memory.peak / GIB)}, more --gpus, or a smaller model"
    )


if __name__ == "__main__":
    run_program(main)
