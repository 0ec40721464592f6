"""A trained model of any task in memory: read, built, given its weights, on a device in a dtype."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.evlgen import EVLGen
from model.qformer import QFormerPairs
from model.vision.tower import tokens_of
from pipeline.checkpoint.files import STATE
from pipeline.finetuning.table import task_of
from pipeline.pictures.pictures import Pictures, pictures_of
from pipeline.tasks.trained_run import TrainedRun, read_run, refuse_other_training, use_files_of_run
from pipeline.weights.starting import load_trained

DTYPES = {
    **{"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16},
    **{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16},
}


@dataclass(frozen=True)
class Trained:
    """A run, its ``objective`` in evaluation mode, and how its ``pictures`` are made; samples have ``num_images``."""

    run: TrainedRun
    objective: nn.Module
    pictures: Pictures
    num_images: int
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [B, I, 3, S, S] -> what texts read of the images, [B, I, P, D]; frames of a clip are one."""
        return self.objective.net.encode(pixels.to(self.device)).unflatten(0, (len(pixels), -1))

    @torch.no_grad()
    def tower_tokens(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [B, I, 3, S, S] -> the vision tower's tokens [B, P, W]: of a clip their mean over its frames, of
        several images one after the other."""
        net, pixels = self.objective.net, pixels.to(self.device)
        if isinstance(net, EVLGen | QFormerPairs):
            return net.features(pixels)
        return tokens_of(net.vision, pixels).unflatten(0, (len(pixels), -1)).flatten(1, 2)


def open_trained(folder: Path, device: Any = None, dtype: Any = None) -> Trained:
    """The model of a run folder, a checkpoint folder or an exported folder; None chooses device and dtype.

    PyTorch's generator of random numbers is where it was afterwards.

    Raises:
        ValueError: there is no whole model, or the device or dtype can't be used; one line.
    """
    device = usable_device(device)
    dtype = _dtype(dtype, device)
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(torch.float32)
        try:
            run = read_run(folder)
            task = task_of(run.config)
            use_files_of_run(run.config, task, run.folder)
            if (run.checkpoint / STATE).is_file():
                refuse_other_training(run.checkpoint, run.config, task, run.tokenizer, run.tokenizer.source)
            objective = task.build(run.config, run.tokenizer.vocabulary)
            load_trained(objective, run.config.model, run.checkpoint)
        finally:
            torch.set_default_dtype(before)
    objective = objective.eval().requires_grad_(False).to(device, dtype)
    return Trained(run, objective, pictures_of(run.config, exact=True), task.num_images, device, dtype)


def usable_device(name: Any = None, option: str = "device") -> torch.device:
    """The device of that name; None is cuda where there is one, else cpu. Raises ValueError, naming the ``option``."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:  # what PyTorch raises for a device that is not here
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{option} {name}: not usable here ({reason}); cpu always is") from None


def _dtype(asked: Any, device: torch.device) -> torch.dtype:
    if asked is None:
        has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_it else torch.float32
    found = DTYPES.get(asked) if isinstance(asked, str) else asked
    if found not in DTYPES.values():
        raise ValueError(f"dtype {asked}: expected one of {', '.join(DTYPES)}")
    return found
