"""Counts the parameters of a recipe's model, part by part: python -m pipeline.census --recipe flm_base_4m

Takes every option of training (``--model.vision.image_size 384``), reads no data and needs no memory for the weights.

Exit codes: 0 done, 2 a wrong command line.
"""

from __future__ import annotations

import sys

import torch

from data_prep.program import run_program
from model.census import parameter_census
from pipeline.config.options import fail
from pipeline.dry_run.counting import known_vocabulary
from pipeline.finetuning.table import task_of
from pipeline.weights.packaged import parse_settings


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    try:
        config = parse_settings(sys.argv[1:] if argv is None else argv).config
        vocabulary, words = known_vocabulary(config)
        with torch.device("meta"):
            objective = task_of(config).build(config, vocabulary)
    except ValueError as error:
        return fail(error)
    print(f"objective {config.objective.name}, {words}")
    print(parameter_census(objective).table())
    return 0


if __name__ == "__main__":
    run_program(main)
