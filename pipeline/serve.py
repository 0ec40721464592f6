"""Serves a trained model over HTTP, with a page to try it on: python -m pipeline.serve FOLDER

FOLDER is a run, one of its checkpoints, or an exported folder. Other machines are served only with a token, which their
requests carry as `Authorization: Bearer TOKEN`: the variable OPENFLM_TOKEN, or --token, which other users of this
machine can see. Endpoints and limits: docs/serve.md. Exit codes: 0 ended by SIGTERM or Ctrl-C, 1 bug, 2 options.
"""

from __future__ import annotations

from data_prep.program import run_program
from pipeline.serving.command_line import run


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run(__doc__, argv)


if __name__ == "__main__":
    run_program(main)
