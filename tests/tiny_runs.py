"""Runs of untrained models of every kind that is trained here, with the data that they are evaluated on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from data_prep.drawn.moving_scenes import MovingOptions, write_moving
from data_prep.record import Record
from data_prep.tokenizer import train_tokenizer
from data_prep.vqa_answers import vocabulary_file
from tests.pipeline.data.test_reader import jpeg, write_split
from tests.pipeline.finetuning.test_classification import ANSWERS, nlvr2_record, snli_record, vqa_record
from tests.tiny_frozen_parts import write_language_model
from tests.written_run import write_run

TOWERS = """
model:
  vision: {{name: null, image_size: 32, patch_size: 8, width: 16, layers: 2, head_width: 8}}
  text: {{width: 16, heads: 2, ffn_width: 32, bottom_layers: 1, top_layers: 2, max_positions: 40, dropout: 0.1}}
"""
LANGUAGE = """
model:
  vision: {{name: null, image_size: 32, patch_size: 8, width: 16, layers: 2, head_width: 8}}
  connector: {{name: CONNECTOR, num_tokens: NUM, width: 16, heads: 2, ffn_width: 32, layers: 2, max_positions: 32}}
  language: {{name: "{data}/llm"}}
objective: {{name: evlgen}}
"""
LEFT = {"tomeformer": 7, "tome": 7}  # tokens that merging leaves; others make 4
CONNECTORS = ("tomeformer", "tome", "qformer", "perceiver", "pooling", "pixel_shuffle")
RELEASED = TOWERS.replace("model:\n", "model:\n  behaviour: released\n")
FIRST_STAGE = LANGUAGE.replace("CONNECTOR", "qformer").split("  language")[0] + "objective: {{name: qformer_stage1}}\n"
KINDS = {  # kind -> (model, objective, task, set of data)
    **{name: (TOWERS, f"{{{{name: {name}}}}}", "{{name: pretraining}}", "captions") for name in ("flm", "mlm", "ar")},
    "prefixlm": (TOWERS, "{{name: prefixlm}}", "{{name: pretraining}}", "captions"),
    "captioning": (TOWERS, "{{name: flm}}", "{{name: captioning, max_tokens: 12}}", "captions"),
    "vqa": (TOWERS, "{{name: flm}}", "{{name: vqa}}", "vqa"),
    "vqa_written": (TOWERS, "{{name: ar}}", "{{name: vqa, generative: true, max_answer_tokens: 4}}", "vqa"),
    "nlvr2": (TOWERS, "{{name: mlm}}", "{{name: nlvr2}}", "nlvr2"),
    "snli_ve": (TOWERS, "{{name: flm}}", "{{name: snli_ve}}", "snli_ve"),
    "retrieval": (TOWERS, "{{name: flm}}", "{{name: retrieval}}", "captions"),
    **{f"evlgen_{name}": (LANGUAGE.replace("CONNECTOR", name), "", "", "captions") for name in CONNECTORS},
    "flm_released": (RELEASED, "{{name: flm}}", "{{name: pretraining}}", "captions"),
    "captioning_released": (RELEASED, "{{name: flm}}", "{{name: captioning, max_tokens: 12}}", "captions"),
    "qformer_stage1": (FIRST_STAGE, "", "", "captions"),
    "evlgen_vqa": (LANGUAGE.replace("CONNECTOR", "tome"), "", "{{name: okvqa, max_answer_tokens: 4}}", "vqa"),
    "evlgen_video": (LANGUAGE.replace("CONNECTOR", "pooling"), "", "", "moving"),
}


def caption_record(number: int) -> Record:
    colours, things = ("red", "green", "blue", "white"), ("dog", "cat", "bird")
    text = f"a {colours[number % 4]} {things[number % 3]} number {number} is here"
    return Record(f"c{number:03d}", (jpeg(number),), (text, f"{text} again"), {"image_id": number}, ("jpg",))


def write_data(folder: Path) -> Path:
    """Small sets of every schema, a tokenizer and a language model; ``folder``."""
    records = {"captions": caption_record, "vqa": vqa_record, "nlvr2": nlvr2_record, "snli_ve": snli_record}
    for name, make in records.items():
        for split in ("train", "dev"):
            write_split(folder / name / split, [make(number) for number in range(6)])
    write_moving(folder / "moving", MovingOptions({"train": 4, "dev": 4}, image_size=32, num_frames=6))
    train_tokenizer([folder / "captions" / "train", folder / "vqa" / "train"], folder / "tokenizer", 320)
    content = vocabulary_file([(answer, 9) for answer in ANSWERS], ["train"])
    (folder / "vqa" / "answers.json").write_text(json.dumps(content))
    file = write_language_model(folder / "llm") / "model.safetensors"
    wide = {name: value * (10.0 if value.ndim > 1 else 1.0) for name, value in load_file(file).items()}
    save_file(wide, file, {"format": "pt"})  # a language model that says different things of different images
    return folder


def write_kind(run: Path, data: Path, kind: str, fingerprint: Mapping[str, Any] | None = None) -> Path:
    """``run`` of a kind of KINDS on the ``data`` of ``write_data``, with the files of its task."""
    model, objective, task, name = KINDS[kind]
    left = next((number for name, number in LEFT.items() if f"name: {name}," in model), 4)
    has_own_tokenizer = "language:" in model
    of_data = [f'paths: ["{{data}}/{name}"]', f"max_text_length: {50 if has_own_tokenizer else 20}"]
    of_data += ["fast_decode: false", "num_workers: 0"] + (["frames: 3"] if name == "moving" else [])
    of_data += [] if has_own_tokenizer else ['tokenizer: "{data}/tokenizer"']
    settings = model.replace("NUM", str(left)) + f"data: {{{{{', '.join(of_data)}}}}}\n"
    settings += (f"objective: {objective}\n" if objective else "") + (f"task: {task}\n" if task else "")
    write_run(run, data, settings, fingerprint=fingerprint, spread=4.0)
    if kind == "vqa":
        shutil.copy(data / "vqa" / "answers.json", run)
    return run
