"""Which task a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.config.options import Config
from pipeline.finetuning.captioning import CaptioningTask
from pipeline.finetuning.gqa import gqa
from pipeline.finetuning.nlvr2 import NLVR2
from pipeline.finetuning.okvqa import okvqa
from pipeline.finetuning.retrieval import Retrieval
from pipeline.finetuning.snli_ve import SNLIVE
from pipeline.finetuning.vqa import VQA
from pipeline.tasks.pretraining import Pretraining
from pipeline.tasks.task import Task

TASKS: dict[str, Callable[[Any], Task]] = {  # of the task's options
    "pretraining": lambda _: Pretraining(),
    "vqa": lambda _: VQA(),
    "gqa": lambda _: gqa(),
    "okvqa": lambda _: okvqa(),
    "nlvr2": lambda options: NLVR2(options.num_images),
    "snli_ve": lambda _: SNLIVE(),
    "captioning": lambda _: CaptioningTask(),
    "retrieval": lambda _: Retrieval(),
}


def task_of(config: Config) -> Task:
    """The task of a run, by ``task.name``."""
    return TASKS[config.task.name](config.task)
