"""Importing and using openflm leaves a process as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.using.model import Model
from tests.pipeline.data.test_reader import jpeg

REPOSITORY = Path(__file__).resolve().parents[3]
PROGRAM = """
import logging, os, random, signal, sys, warnings
import openflm
loaded = {"torch", "numpy", "PIL", "transformers", "deepspeed", "pipeline"} & set(sys.modules)
assert not loaded, loaded

def light():
    return {
        "variables": dict(os.environ), "filters": list(warnings.filters), "showing": warnings.showwarning,
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()], "random": random.getstate(),
        "folder": os.getcwd(), "path": list(sys.path), "excepthook": sys.excepthook,
    }

before = light()
model = openflm.load(sys.argv[1], device="cpu")  # the first to import torch here
changed = [name for name, value in light().items() if value != before[name]]
assert not changed, changed

import numpy, torch

def heavy():
    name, keys, *rest = numpy.random.get_state()
    return {
        **light(), "torch": torch.get_rng_state().tolist(), "numpy": (name, keys.tolist(), rest),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()), "dtype": torch.get_default_dtype(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "exact": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
    }

torch.manual_seed(7)
torch.set_default_dtype(torch.float64)
before = heavy()
for model in [openflm.load(folder, device="cpu") for folder in sys.argv[2:]]:
    image = open(sys.argv[1] + "/image.jpg", "rb").read()
    texts = ["a dog", "a cat"]
    if "caption" in model.abilities:
        model.caption([image, image], beams=None if model.objective == "mlm" else 2)
        stream = model.caption_stream(image)
        next(stream)
        changed = [name for name, value in heavy().items() if value != before[name]]
        assert not changed, ("in a stream", changed)
        list(stream)
    if "match" in model.abilities:
        model.match(image, texts)
        model.index([image]).search("a dog")
    if "answer" in model.abilities:
        model.answer(image, texts)
    model.features(image)
    changed = [name for name, value in heavy().items() if value != before[name]]
    assert not changed, (model, changed)
assert "deepspeed" not in sys.modules
print("as it was")
"""


@pytest.mark.slow(20)
def test_a_fresh_process_is_as_it_was(model_of: Callable[[str], Model], tiny_data: Path) -> None:
    kinds = ("flm", "mlm", "captioning", "vqa", "evlgen_tome")
    for kind in kinds:
        model_of(kind)
    runs = [tiny_data.parent / kind for kind in kinds]
    (runs[0] / "image.jpg").write_bytes(jpeg(1))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    command = [sys.executable, "-c", PROGRAM, runs[0], *runs]
    done = subprocess.run(command, env=environment, cwd=tiny_data, capture_output=True, text=True, timeout=200)
    assert done.stdout == "as it was\n", done.stdout + done.stderr
