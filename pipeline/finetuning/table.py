"""Which task a configuration asks for."""

from __future__ import annotations

from pipeline.config.options import Config
from pipeline.finetuning.captioning import CaptioningTask
from pipeline.finetuning.nlvr2 import NLVR2
from pipeline.finetuning.retrieval import Retrieval
from pipeline.finetuning.snli_ve import SNLIVE
from pipeline.finetuning.vqa import VQA
from pipeline.tasks.pretraining import Pretraining
from pipeline.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    "pretraining": Pretraining,
    "vqa": VQA,
    "nlvr2": NLVR2,
    "snli_ve": SNLIVE,
    "captioning": CaptioningTask,
    "retrieval": Retrieval,
}


def task_of(config: Config) -> Task:
    """The task of a run, by ``task.name``."""
    return TASKS[config.task.name]()
