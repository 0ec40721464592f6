"""The planner against a run of EVLGen's recipe of the paper, its language model a random OPT of a tenth of OPT-2.7B.

    python -m benchmarks.cost.planner_evlgen [--stages 1 3] [--ranks 1] [--output RESULT.json]

Everything else is the recipe's own size: EVA-CLIP's ViT-g, random and frozen, in a file of 2 GB that is made first, and
a TomeFormer of BERT's size, trained. Peak memory of each rank on CPUs against ``memory_of``; seconds of a step are
written down and not judged, as the constants of a CPU are fitted on other networks. Wants 16 GB of memory a rank.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.cost.loading import machine
from benchmarks.cost.planner import NOT_COUNTED, SMALL, count
from benchmarks.cost.training_ranks import make_data, train
from model.config import VisionConfig
from model.torchvision_shim import ensure_torchvision
from model.vision.tower import build_tower
from model.weights.towers import EVA_RULES
from tests.tiny_frozen_parts import write_language_model

A_TENTH = {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 16, "num_attention_heads": 16}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        data = make_data(folder / "data", image_size=64)
        base = max(train([*SMALL.split(), "--data", str(data)], 2, folder / "base").peak_bytes)
        tower, language = write_tower(folder / "tower.safetensors"), write_opt(folder / "opt")
        for stage in arguments.stages:
            words = words_of(stage, arguments.ranks, data, tower, language)
            planned = count(words, arguments.ranks, data, base)
            trained = train([*words, "--train.steps", str(arguments.steps)], arguments.ranks, folder / f"zero{stage}")
            measured = max(trained.peak_bytes)
            rows[f"zero{stage}, {arguments.ranks} rank(s)"] = {
                "trained": planned.parameters.trained,
                "frozen": planned.parameters.frozen,
                "memory_bytes": {"planned": planned.memory.peak, "measured": measured},
                "memory_off": planned.memory.peak / measured - 1,
                "memory_by_part": {**planned.memory.held, **planned.memory.moments[planned.memory.moment]},
                "step_seconds": statistics.median(trained.step_seconds[NOT_COUNTED:]),
            }
            print(json.dumps(rows, indent=1), file=sys.stderr, flush=True)
    given = list(sys.argv[1:] if argv is None else argv)
    command = " ".join(["python -m benchmarks.cost.planner_evlgen", *given])
    text = json.dumps({"command": command, "machine": machine(), "base_bytes": base, "configurations": rows}, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost.planner_evlgen", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[1], help="of ZeRO (default: 1)")
    parser.add_argument("--ranks", type=int, default=1, help="(default: 1)")
    parser.add_argument("--steps", type=int, default=NOT_COUNTED + 2, help=f"of which {NOT_COUNTED} are not counted")
    parser.add_argument("--folder", type=Path, help="where files and runs are made (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON here")
    return parser.parse_args(argv)


def words_of(stage: int, ranks: int, data: Path, tower: Path, language: Path) -> list[str]:
    """Options of training: the recipe with two images a rank and step, one at a time."""
    options = (
        f"--recipe evlgen_opt2.7b --deepspeed ds_configs/zero{stage}.json --data {data}"
        f" --model.vision.pretrained {tower} --model.language.name {language} --model.connector.pretrained null"
        f" --optim.micro_batch_size 1 --optim.batch_size {2 * ranks} --train.precision fp32 --train.eval_every 0"
        " --train.eval_samples 2 --train.save_every 3 --tracking.tensorboard false --tracking.report false"
        " --guard.save_incident_every 0 --data.num_workers 1 --data.prefetch 1"
    )
    return options.split()


def write_tower(file: Path) -> Path:
    """A random ViT-g as EVA-CLIP's file names its tensors, in half precision."""
    with torch.device("meta"):
        expected = build_tower(VisionConfig(name="eva-vit-g", image_size=224)).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in expected.items():
        rule, foreign = next((rule, names[0]) for rule, names in EVA_RULES if re.fullmatch(rule, name))
        content = torch.randn(value.shape, generator=generator).mul_(0.02).half()
        if name == "class_embedding":
            content = content[None, None]
        elif name == "position_embedding":
            content = content[None]
        state[re.sub(rule, foreign, name)] = content
    save_file(state, file)
    return file


def write_opt(folder: Path) -> Path:
    """A random OPT of 255 M parameters with a tokenizer of bytes."""
    ensure_torchvision()
    import transformers

    write_language_model(folder, "opt")
    vocabulary = {"vocab_size": 50272, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    settings = transformers.OPTConfig(word_embed_proj_dim=A_TENTH["hidden_size"], **A_TENTH, **vocabulary)
    transformers.AutoModelForCausalLM.from_config(settings).half().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
