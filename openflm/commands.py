"""The console commands: each does what ``python -m MODULE`` does, the end by a signal while it imports included."""

from __future__ import annotations

import runpy
from functools import partial

MODULES = {
    "train": "pipeline.train",
    "data": "data_prep",
    "evaluate": "pipeline.evaluate",
    "generate": "pipeline.generate",
    "report": "pipeline.report",
    "plan": "pipeline.plan",
    "convert": "pipeline.convert",
    "features": "pipeline.features",
    "status": "pipeline.status",
    "export": "pipeline.export",
    "serve": "pipeline.serve",
}


def start(module: str) -> None:
    """Run a module as the program; it ends the process."""
    runpy.run_module(module, run_name="__main__", alter_sys=True)


train, data, evaluate, generate, report, plan, convert, features, status, export, serve = (
    partial(start, module) for module in MODULES.values()
)
