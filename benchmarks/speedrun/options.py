"""The command line of the speedrun."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.probes.__main__ import IMAGES
from benchmarks.speedrun.plan import Budget

RECIPES = Path(__file__).resolve().parent / "recipes"
_WORDS = {int: "whole number", float: "number"}


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The options; besides them ``words`` (as given) and ``budget``."""

    def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
        def convert(text: str) -> float:
            try:
                value = kind(text)
            except ValueError:
                value = 0
            if not 0 < value < float("inf"):
                raise argparse.ArgumentTypeError(f"found {text!r}, expected a {_WORDS[kind]} above 0")
            return value

        return convert

    count, amount = positive(int), positive(float)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speedrun",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="DIR", help="prepared data with a training and a held-out split")
    add("--output", type=Path, required=True, help="folder of the speedrun; one that was begun is continued")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget-minutes", type=amount, metavar="M", help="minutes of training of each row and seed")
    budget.add_argument("--budget-tflop", type=amount, metavar="F", help="TFLOP of training of each row and seed")
    budget.add_argument("--steps", type=count, metavar="N", help="optimizer steps of each: equal samples")
    add(
        "--recipe",
        default="demo",
        type=_recipe,
        help="settings all rows start from: a name in benchmarks/speedrun/recipes, a recipe of training, or a YAML "
        "file (default: demo)",
    )
    add("--deepspeed", metavar="FILE", help="DeepSpeed JSON of all trainings (default: that of pipeline/train.py)")
    add("--rows", default="objectives", help="benchmarks/speedrun/rows/NAME.yaml or a YAML file (default: objectives)")
    add("--only", nargs="+", metavar="ROW", help="only these rows of the file")
    add("--target", nargs="+", metavar="ROW", help="the best of these sets the target (default: full rows of MLM)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="a training each; may be added later (default: 0 1 2)")
    add("--evaluations", type=count, default=5, help="checkpoints that are probed, evenly spaced (default: 5)")
    add("--jobs", type=count, default=1, help="trainings side by side; calibrated under the same load (default: 1)")
    add("--ranks", type=count, default=1, help="ranks of a training, by the deepspeed launcher (default: 1)")
    for name, default, what in IMAGES:
        add(f"--{name}-images", type=count, default=default, help=f"images {what} (default: {default})")
    add(
        "--calibration-steps",
        type=count,
        default=40,
        help="steps of the trainings that time a row (default: 40)",
    )
    add(
        "--finetune",
        nargs="+",
        metavar="RECIPE=STEPS[:N]",
        default=[],
        type=_finetuning,
        help="recipes of tasks to fine-tune each training's last checkpoint by, scored on N held-out samples "
        f"(flickr8k_caption=150:500; N is {Finetuning.samples} if not said)",
    )
    add(
        "--clock",
        choices=("measured", "calibrated"),
        default="measured",
        help="time of a training: as it was, or its steps at the cost of calibration, where other work goes on beside",
    )
    add(
        "--join",
        nargs="+",
        metavar="RESULTS",
        default=[],
        type=Path,
        help="results.json of the same comparison in other folders or on other machines: their trainings count as "
        "done, and each row trains for as many steps as there",
    )
    add("--keep-checkpoints", action="store_true", help="keep probed checkpoints, not only the last of each run")
    add("--report-only", action="store_true", help="train nothing, write the report of what is finished")
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(words)
    if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds) < 0:
        parser.error(f"--seeds: found {arguments.seeds}, expected different numbers of at least 0")
    arguments.words, arguments.budget = words, _budget(arguments)
    if arguments.clock == "calibrated" and arguments.budget.kind != "minutes":
        parser.error("--clock calibrated is for --budget-minutes: no other budget is calibrated in seconds")
    if len({one.recipe for one in arguments.finetune}) < len(arguments.finetune):
        parser.error(f"--finetune: found {' '.join(map(str, arguments.finetune))}, expected different recipes")
    return arguments


@dataclass(frozen=True)
class Finetuning:
    """A recipe of a task, for how many steps each training's last checkpoint is fine-tuned by it, and how many
    held-out samples score it.
    """

    recipe: str
    steps: int
    samples: int = 300

    def __str__(self) -> str:
        return f"{self.recipe}={self.steps}:{self.samples}"

    @property
    def name(self) -> str:
        """Of its folder."""
        return Path(self.recipe).stem


def _finetuning(text: str) -> Finetuning:
    recipe, _, numbers = text.rpartition("=")
    counts = numbers.split(":")
    if not recipe or len(counts) > 2 or not all(count.isdecimal() and int(count) for count in counts):
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected RECIPE=STEPS or RECIPE=STEPS:SAMPLES, such as flickr8k_caption=150:500"
        )
    return Finetuning(recipe, *map(int, counts))


def _recipe(name: str) -> str:
    """The file of a recipe of the speedrun, any other as it is: pipeline/train.py knows it."""
    own = RECIPES / f"{name}.yaml"
    return str(own) if own.is_file() else name


def shared_words(arguments: argparse.Namespace) -> list[str]:
    """The words of every training's command line that say what all rows share."""
    deepspeed = ["--deepspeed", arguments.deepspeed] if arguments.deepspeed else []
    return [*deepspeed, "--recipe", arguments.recipe, "--data", *arguments.data]


def probe_words(arguments: argparse.Namespace) -> list[str]:
    """The options of the probes."""
    return [word for name, _, _ in IMAGES for word in (f"--{name}-images", str(getattr(arguments, f"{name}_images")))]


def without_folders(word: str) -> str:
    """An absolute path by its name, which is the same on other machines; all else as it is."""
    return Path(word).name if Path(word).is_absolute() else word


def shown(word: str) -> str:
    """An absolute path as seen from the working folder, or its name alone."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else without_folders(word)


def _budget(arguments: argparse.Namespace) -> Budget:
    if arguments.steps is not None:
        return Budget("steps", arguments.steps)
    if arguments.budget_tflop is not None:
        return Budget("tflop", arguments.budget_tflop)
    return Budget("minutes", arguments.budget_minutes)
