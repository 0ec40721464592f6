"""Tiny runs of several kinds to be exported, with the data that they were made on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from data_prep.tokenizer import train_tokenizer
from data_prep.vqa_answers import vocabulary_file
from model.weights.start import named_tensors
from pipeline.checkpoint.files import PartWriter, Piece, publish, run_of
from pipeline.checkpoint.restore import read_state, resolve
from pipeline.config.command_line import load_config
from pipeline.config.options import Config
from pipeline.data.tokenizer import TextTokenizer, tokenizer_of
from pipeline.finetuning.table import task_of
from pipeline.weights.starting import load_trained
from tests.pipeline.data.test_reader import write_split
from tests.pipeline.finetuning.test_classification import ANSWERS, vqa_record
from tests.tiny_corpus import make_corpus
from tests.tiny_frozen_parts import write_clip, write_language_model
from tests.written_run import TINY, write_run

EVLGEN = """
model:
  vision: {{name: null, pretrained: "{data}/clip.safetensors", frozen: true, image_size: 32, patch_size: 8, width: 32,
    layers: 2, head_width: 16, drop_last_block: false}}
  connector: {{num_tokens: 6, width: 32, heads: 2, ffn_width: 64, layers: 2, max_positions: 32, dropout: 0.0}}
  language: {{name: "{data}/llm", lora_rank: 2}}
objective: {{name: evlgen}}
task: {{name: captioning}}
data: {{paths: ["{data}"], max_text_length: 20, num_workers: 0}}
"""
SETTINGS = {
    "flm": TINY,
    "ar": TINY + "objective: {{name: ar}}\n",
    "vqa": TINY + "task: {{name: vqa}}\n",
    "evlgen": EVLGEN,
}


def make_data(folder: Path) -> Path:
    """Scenes with a tokenizer, questions with answers, a random CLIP and a random language model."""
    data = make_corpus(folder / "data", train=40, dev=12, vocabulary_size=300)
    records = [vqa_record(number) for number in range(6)]
    for split in ("train", "dev"):
        write_split(folder / "questions" / "toy" / split, records)
    train_tokenizer([folder / "questions" / "toy" / "train"], folder / "questions" / "tokenizer", 300)
    answers = vocabulary_file([(answer, 9) for answer in ANSWERS], ["train"])
    (folder / "questions" / "answers.json").write_text(json.dumps(answers))
    write_clip(data / "clip.safetensors")
    write_language_model(data / "llm", width=32)
    return data


def make_run(kind: str, folder: Path) -> Path:
    """A run named RUN_KIND beside the data that ``make_data`` wrote into ``folder``; all of its weights are random."""
    data = folder / ("questions/toy" if kind == "vqa" else "data")
    run = write_run(folder / f"run_{kind}", data, SETTINGS[kind])
    if kind == "evlgen":  # adapters begin at nothing
        disturb_adapters(run)
    return run


def disturb_adapters(run: Path) -> None:
    """Give the up-projections of a run's adapters other values than the zeros that they begin with."""
    checkpoint, writer_folder = resolve(run), run / "checkpoints" / "step_00000001.tmp"
    _, _, objective = loaded(run)
    state, frozen = read_state(checkpoint), set(read_state(checkpoint).frozen["names"])
    writer_folder.mkdir()
    writer = PartWriter(writer_folder, rank=0)
    for name, value in named_tensors(objective):
        if name not in frozen:
            value = torch.full_like(value, 0.02) if name.endswith("adapter.up.weight") else value.detach()
            writer.add(Piece(name, 0, tuple(value.shape), {"weight": value}))
    publish(writer_folder, checkpoint, dataclasses.asdict(state), writer.finish())


def loaded(folder: Path) -> tuple[Config, TextTokenizer, nn.Module]:
    """The model of a run or of an exported folder, as every program of ours loads one."""
    checkpoint = resolve(folder)
    config = load_config(run_of(checkpoint))
    tokenizer = tokenizer_of(config)
    objective = task_of(config).build(config, tokenizer.vocabulary)
    load_trained(objective, config.model, checkpoint)
    return config, tokenizer, objective.eval()


def pixels(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """uint8 [B, 1, 3, S, S]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 3, size, size), generator=generator, dtype=torch.uint8)
