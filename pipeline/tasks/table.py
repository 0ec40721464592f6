"""Which task a configuration asks for."""

from __future__ import annotations

from pipeline.config.options import Config
from pipeline.tasks.pretraining import Pretraining
from pipeline.tasks.task import Task


def task_of(config: Config) -> Task:
    """The task of a run; a fine-tuning task gets its line here."""
    return Pretraining()
