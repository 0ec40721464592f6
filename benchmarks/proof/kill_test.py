"""Kills training by SIGKILL at random moments, resumes it, and compares the finished run with an uninterrupted one.

    python -m benchmarks.proof.kill_test --kills 8 --cells all [--recipe evlgen_tiny] [--output FILE] [--folder DIR]

Each cell (ZeRO stage, precision) trains a tiny FLM, or EVLGen on frozen parts, with 2 ranks under the real
`deepspeed` launcher, with dropout, evaluations, loader processes and a checkpoint every other step. About half of the
kills wait for a checkpoint being written. The comparison is bit for bit: sample keys of each step, every logged
number that is no measure of time or memory (also of the steps that were done again), weights, both moments and the
run's state. Cells that the results file already holds are not run again unless --again. Exit codes: 0 all equal, 1 a
difference.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.proof.killed_launch import Kill, Launcher
from benchmarks.proof.same_run import differences
from pipeline.recording.environment import describe_environment
from tests.tiny_frozen_parts import write_clip, write_language_model

REPOSITORY = Path(__file__).resolve().parents[2]
CELLS = [
    f"{precision}-zero{stage}"
    for precision, stages in (("fp32", (0, 1, 2, 3)), ("bf16", (1, 2, 3)))
    for stage in stages
]
PLACES = ("set-up", "training", "saving", "evaluating", "finishing")
WEIGHTS = (0.1, 0.2, 0.5, 0.1, 0.1)  # what a kill aims at; where it fell is found out afterwards
SETTINGS = {
    "--train.log_every": 1,
    "--train.eval_every": 8,
    "--train.save_every": 2,
    "--data.num_workers": 1,
    "--tracking.sample_keys": "true",
}

RECIPES = {  # recipe -> what it needs besides
    "flm_tiny": {},
    "evlgen_tiny": {
        "--model.language.name": "language",
        "--model.vision.pretrained": "tower.safetensors",
        "--model.vision.frozen": "true",
        "--model.connector.dropout": 0.1,
    },
}
RESULTS = {"flm_tiny": "kill_test.json", "evlgen_tiny": "kill_test_evlgen.json"}


def main() -> int:
    arguments = parse_arguments()
    cells = CELLS if arguments.cells == ["all"] else arguments.cells
    output = arguments.output or REPOSITORY / "benchmarks" / "results" / RESULTS[arguments.recipe]
    results = json.loads(output.read_text()) if output.is_file() else {}
    found = results.setdefault("cells", {})
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        prepare_data(Path(folder))
        prepare_frozen_parts(Path(folder))
        for number, cell in enumerate(cells):
            if cell in found and not arguments.again:
                continue
            seed = arguments.seed + number
            found[cell] = run_cell(cell, arguments.kills, arguments.steps, Path(folder), seed, recipe=arguments.recipe)
            results["environment"] = describe_environment(torch.device("cpu"))
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(results, indent=1) + "\n")
    print(table({cell: found[cell] for cell in CELLS if cell in found}))
    return 1 if any(found[cell]["differences"] for cell in cells) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=8, help="kills per cell")
    parser.add_argument("--cells", nargs="+", default=["all"], choices=["all", *CELLS])
    parser.add_argument("--steps", type=int, default=48, help="optimizer steps of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--recipe", default="flm_tiny", choices=RECIPES, help="what is trained (default: flm_tiny)")
    parser.add_argument("--output", type=Path, help="results (default: one of benchmarks/results/, by the recipe)")
    parser.add_argument("--folder", type=Path, help="where the runs are written (a temporary folder inside it)")
    parser.add_argument("--again", action="store_true", help="run cells again that the results file holds")
    return parser.parse_args()


def prepare_data(folder: Path) -> None:
    """A synthetic corpus and its tokenizer, as `data_prep` makes them."""
    sizes = [
        "--train",
        "120",
        "--dev",
        "24",
        "--test",
        "2",
        "--image-size",
        "32",
        "--workers",
        "1",
        "--pair-share",
        "0",
    ]
    for verb in (["synth", *sizes, "--output", "data"], ["tokenizer", "--data", "data", "--vocab-size", "400"]):
        command = [sys.executable, "-m", "data_prep", *verb]
        environment = Launcher.environment() | {"PYTHONPATH": str(REPOSITORY)}
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=100)


def prepare_frozen_parts(folder: Path) -> None:
    """What EVLGen does not train, with random weights."""
    write_clip(folder / "tower.safetensors")
    write_language_model(folder / "language")


def run_cell(
    cell: str,
    kills: int,
    steps: int,
    folder: Path,
    seed: int,
    aims: list[str] | None = None,
    launcher_class: type[Launcher] = Launcher,
    recipe: str = "flm_tiny",
) -> dict[str, Any]:
    """The reference run, then runs that are killed and resumed until there were ``kills`` kills and each has finished.

    ``aims`` fixes what the kills aim at, in order; drawn by ``WEIGHTS`` otherwise.
    """
    precision, stage = cell.split("-zero")
    settings = {"--recipe": recipe, **RECIPES[recipe], **SETTINGS}
    settings |= {"--train.steps": steps, "--train.precision": precision}
    script = [
        str(REPOSITORY / "pipeline" / "train.py"),
        "--deepspeed",
        str(REPOSITORY / "ds_configs" / f"zero{stage}.json"),
    ]
    launcher = launcher_class(folder, [*script, *(str(word) for pair in settings.items() for word in pair)], steps)
    reference = folder / f"{cell}-whole"
    launcher.finish(reference)
    chance = random.Random(f"{cell} {seed}")
    record: list[dict[str, Any]] = []
    found: list[str] = []
    runs = launches = 0
    while len(record) < kills:
        run = folder / f"{cell}-killed{runs}"
        runs += 1
        while True:
            aim = None
            if len(record) < kills:
                aim = aims[len(record)] if aims else chance.choices(PLACES, WEIGHTS)[0]
            launches += 1
            kill = launcher.start_and_kill(run, aim, chance)
            if kill is None:
                break
            record.append(kill.as_record())
            say(cell, len(record), kills, kill)
        found += differences(reference, run)
    fell = Counter(kill["fell"] for kill in record)
    result = {
        "kills": len(record),
        "fell": {place: fell[place] for place in PLACES},
        "runs": runs,
        "launches": launches,
        "steps": steps,
        "seed": seed,
        "steps_done_again": sum(kill["lost_steps"] for kill in record),
        "differences": found,
        "record": record,
    }
    print(f"{cell}: {len(record)} kills, {runs} runs finished, {'; '.join(found) or 'all equal'}", flush=True)
    return result


def say(cell: str, number: int, kills: int, kill: Kill) -> None:
    print(
        f"{cell}: kill {number}/{kills} aimed at {kill.aim}, fell on {kill.fell} after {kill.seconds:.1f} s, "
        f"{kill.processes} processes, step {kill.step}, newest checkpoint {kill.saved}",
        flush=True,
    )


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: one row per cell and a sum."""
    head = ["cell (2 ranks)", "kills", *PLACES, "launches", "runs finished", "steps done again", "differences"]
    rows = [
        [name, cell["kills"], *(cell["fell"][place] for place in PLACES)]
        + [cell["launches"], cell["runs"], cell["steps_done_again"], len(cell["differences"])]
        for name, cell in cells.items()
    ]
    rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(word) for word in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
