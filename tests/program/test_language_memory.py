"""A language model at ZeRO-3: no rank but the first holds the whole of it, not even while it is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pipeline.config.command_line import parse_command_line
from pipeline.distributed.connecting import Ranks
from pipeline.distributed.places import Place
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.finetuning.table import task_of
from pipeline.training.session import resolve_ds_config, set_up
from tests.forked_ranks import run_ranks
from tests.pipeline.data.test_reader import records, write_split
from tests.pipeline.language_weights.test_files import PEAK, resident
from tests.program.test_evlgen import options
from tests.program.test_frozen_tower import zero
from tests.tiny_frozen_parts import write_clip, write_language_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEAK.exists() or not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc"),
]


def peak(place: Place, words: list[str]) -> int:
    """Bytes by which this rank's largest memory grows until its engine stands."""
    launch, device = parse_command_line(words), torch.device("cpu")
    ranks = Ranks(place, device, Agreement(), StopRequest())
    ds_config = resolve_ds_config(launch, place, device)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    set_up(launch, ds_config, task_of(launch.config), ranks)
    return resident("VmHWM") - before


def test_other_ranks_hold_their_part(tmp_path: Path) -> None:
    write_split(tmp_path / "data" / "toy" / "train", records(40))
    write_split(tmp_path / "data" / "toy" / "dev", records(40)[:8])
    write_clip(tmp_path / "clip.safetensors")
    for name, width in (("small", 32), ("llm", 3072)):
        write_language_model(tmp_path / name, width=width)
    size = (tmp_path / "llm" / "model.safetensors").stat().st_size
    found = {}
    for name in ("small", "llm"):
        words = options(tmp_path, tmp_path / f"run-{name}", "--model.language.name", tmp_path / name, *zero(3))
        found[name] = run_ranks(2, peak, words)
    grown = [large - small for small, large in zip(found["small"], found["llm"], strict=True)]
    largest = 4 * 3072**2  # bytes of a tensor
    assert grown[1] < size / 2 + 1.5 * largest < 0.75 * size and grown[0] > size
