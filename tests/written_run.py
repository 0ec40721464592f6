"""A run folder with the checkpoint of an untrained model, for tests of programs that read runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model.frozen import frozen_tensors
from model.weights.start import named_tensors
from pipeline.checkpoint.files import PartWriter, Piece, checkpoint_path, publish
from pipeline.checkpoint.restore import describe_frozen
from pipeline.checkpoint.state import RunState
from pipeline.config.command_line import load_config
from pipeline.data.tokenizer import tokenizer_of
from pipeline.finetuning.table import task_of
from pipeline.tasks.task import Task
from pipeline.weights.sources import load_frozen_parts

TINY = """
model:
  vision: {{name: null, image_size: 32, patch_size: 16, width: 16, layers: 2, head_width: 8}}
  text: {{width: 16, heads: 2, ffn_width: 32, bottom_layers: 1, top_layers: 1, max_positions: 40, dropout: 0.0}}
data: {{paths: ["{data}"], max_text_length: 20}}
"""


def write_run(
    run: Path,
    data: Path,
    settings: str = TINY,
    task: Task | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    spread: float = 1.0,
) -> Path:
    """``run`` with config.yaml, ``settings`` with {data} filled in, and step 1 of the model of its task.

    Matrices are multiplied by ``spread``: above 1 outputs depend visibly on inputs.
    """
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(settings.format(data=data))
    config = load_config(run)
    torch.manual_seed(0)
    objective = (task or task_of(config)).build(config, tokenizer_of(config).vocabulary)
    load_frozen_parts(objective, config.model)
    frozen = frozen_tensors(objective)
    folder = run / "checkpoints" / "step_00000001.tmp"
    folder.mkdir(parents=True)
    writer = PartWriter(folder, rank=0)
    for name, value in named_tensors(objective):
        if name not in frozen:
            wide = isinstance(value, torch.nn.Parameter) and value.ndim > 1
            writer.add(Piece(name, 0, tuple(value.shape), {"weight": value.detach() * (spread if wide else 1.0)}))
    state = RunState(step=1, fingerprint=dict(fingerprint or {}), frozen=describe_frozen(objective))
    publish(folder, checkpoint_path(run, 1), dataclasses.asdict(state), writer.finish())
    return run
