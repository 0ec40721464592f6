"""What a task is: rows and targets of a sample, an objective, scores with a direction, and passes of evaluation.

The training loop, the engine, the loader and the checkpoints know tasks by this file alone. A new task is one file that
defines these functions, and a line in ``finetuning/table.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from data_prep.manifest import CAPTIONS
from model.batch import Batch
from model.config import Vocabulary
from model.decode.search import alone
from pipeline.config.options import Config
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.tokenizer import TextTokenizer
from pipeline.distributed.places import Place
from pipeline.loading.datasets import Preparation
from pipeline.loading.loader import BatchLoader

Prediction = dict[str, Any]


class Score(NamedTuple):
    """A held-out number by its name in log.jsonl, and which way is better."""

    name: str
    higher_is_better: bool

    def improves(self, value: float, best: float | None) -> bool:
        """Whether ``value`` is better than ``best`` (None: nothing yet); what is not finite never is."""
        if not math.isfinite(value):
            return False
        if best is None or not math.isfinite(best):
            return True
        return value > best if self.higher_is_better else value < best


class Measurement(NamedTuple):
    """What one batch adds to an evaluation.

    ``sums`` are added up over batches and ranks (scalars on the device, or host numbers). ``predictions``, one for each
    item that was judged, are gathered from all ranks in the order of the evaluation: dicts by name of what JSON holds
    and of numpy arrays, each with the item's "position" (``Batch.positions``) and "key" (``Batch.keys``). What a name
    with "_" before it holds is for ``summarise``, ``write`` and ``submission``, and stays out of predictions.jsonl.
    """

    sums: Mapping[str, Tensor | float]
    predictions: Sequence[Prediction] = ()


@dataclass(frozen=True)
class EvaluationRanks:
    """Who evaluates: this rank, whether batches are pinned, how ranks that share one network agree that all are
    done (``model.decode.search``), and whether training waits, so that scores which take minutes are left out."""

    place: Place
    pin: bool = False
    all_agree: Callable[[bool], bool] = alone
    in_training: bool = False


@dataclass(frozen=True)
class EvaluationPass:
    """One sweep over held-out samples, each exactly once on any number of ranks.

    ``measure`` runs inside the engine's forward, in evaluation mode and without gradients, as often on every rank;
    ``placeholder`` is for ranks that have run dry. ``begin``, if given, runs there once before, for what all batches
    share. ``summarise`` turns the sums of ``quantities`` and the predictions of all ranks, in order, into values by
    name, on rank 0 only; a value NAME_standard_error is the standard error of NAME, and what it adds to a prediction is
    written down. ``write``, if given, runs after it, on rank 0 with the folder of the evaluation, which is there, and
    the predictions: for files of the task's own beside predictions.jsonl, which the program writes.
    """

    batches: BatchLoader
    placeholder: Batch
    measure: Callable[[nn.Module, Batch], Measurement]
    quantities: tuple[str, ...]
    summarise: Callable[[Mapping[str, float], list[Prediction]], dict[str, float]]
    name: str = ""  # stands before the names of its values, like "shuffled/"
    write: Callable[[Path, list[Prediction]], None] | None = None
    begin: Callable[[nn.Module], None] | None = None


class Task(Protocol):
    """What is trained and how it is scored. Nothing here touches a device."""

    num_images: int  # of one sample

    def build(self, config: Config, vocabulary: Vocabulary) -> nn.Module:
        """The objective, with random weights: ``forward(batch)`` gives the sum of losses of each term, and it has
        ``term_weights``, ``parameter_group``, ``decays`` and ``flops``. Raises ValueError for options that do not fit.
        """

    def preparation(self, config: Config, objective: nn.Module, tokenizer: TextTokenizer) -> Preparation:
        """How samples become batches of the objective."""

    def scores(self, objective: nn.Module) -> tuple[Score, ...]:
        """Held-out numbers that compare checkpoints (``train.keep_best``); the first two are the headline."""

    def passes(
        self,
        config: Config,
        objective: nn.Module,
        preparation: Preparation,
        held_out: Sequence[Corpus],
        ranks: EvaluationRanks,
    ) -> list[EvaluationPass]:
        """The passes of an evaluation over the ``held_out`` corpora (at least one)."""


def texts_of(task: Task) -> str:
    """What the texts of a task are, by which a folder of corpora is searched: its ``texts``, or else captions."""
    return getattr(task, "texts", CAPTIONS)


class TaskExtras(Protocol):
    """What a task may have besides, each by itself; ``protocol`` and ``submission`` run on rank 0 only."""

    texts: str
    """What the texts of its corpora are (``texts_of``)."""

    run_files: Mapping[str, str]
    """Files beside the checkpoints of a run that belong to its model, and the options that name them, such as
    {"answers.json": "task.answers"}. A run copies what the option names when it starts; where RUN has the file, an
    evaluation sets the option to it."""

    def fingerprint(self, config: Config) -> dict[str, Any]:
        """What of the task's own files decides what a step computes, by name: a run goes on, and is evaluated, with
        the same only. Every rank computes it."""

    def protocol(self, config: Config) -> dict[str, Any]:
        """How the numbers are made, for those who compare them: names and values that JSON holds, for the scorecard.

        Such as the evaluator and its revision, the tokenization, the revision of the labels. The entry "decoding", if
        there is one, is {"name": "beam", "beams": 3, ...}: it has a place of its own in the scorecard, and its name is
        part of the folder's. Evaluations with different protocols are different ones: none goes on with another's
        batches.
        """

    def submission(self, config: Config, predictions: Sequence[Prediction], items: Iterable[RawSample]) -> Any:
        """The official results file: a list or dict, for submission.json, or the text of submission.csv.

        ``predictions`` are those of the first pass, in order; ``items`` all samples of the evaluation, also those
        without a prediction, in order and without their images.

        Raises:
            ValueError: an item is missing, there twice or of a wrong type, or the task has no such file; one line that
                names the item.
        """
