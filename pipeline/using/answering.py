"""Answers: the most probable of a list, or written word by word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_prep.vqa_answers import read_vocabulary
from model.objectives.classification import Classification
from pipeline.data.shard_reader import RawSample
from pipeline.finetuning import nlvr2, snli_ve
from pipeline.finetuning.classification import TextRows
from pipeline.finetuning.vqa import answers_file
from pipeline.loading.collate import Item, collate
from pipeline.tasks import written_answers
from pipeline.using.trained import Trained

QUESTIONS = ("vqa", "gqa", "okvqa")

Answer = tuple[str, float | None]


def answers(trained: Trained) -> list[str] | None:
    """What a model chooses from; None of one that writes its answers, or gives none."""
    if not isinstance(trained.objective, Classification):
        return None
    labels = {"nlvr2": [name.lower() for name in nlvr2.LABELS], "snli_ve": list(snli_ve.LABELS)}
    return labels.get(trained.objective.term) or read_vocabulary(answers_file(trained.run.config))


def can_answer(trained: Trained) -> bool:
    return isinstance(trained.objective, Classification) or trained.run.config.task.name in QUESTIONS


def choose(
    trained: Trained, tokens: Tensor, questions: Sequence[str], names: Sequence[str], top: int
) -> list[list[Answer]]:
    """The ``top`` most probable of the answers ``names`` to each question about images of ``tokens`` [B, I, P, D]."""
    logits = class_logits(trained, tokens, questions)
    of_questions = trained.run.config.task.name in QUESTIONS  # whose classes do not exclude each other
    found = (logits.sigmoid() if of_questions else logits.softmax(1)).topk(min(top, len(names)), dim=1)
    both = zip(found.values.tolist(), found.indices.tolist(), strict=True)
    return [[(names[number], value) for value, number in zip(*row, strict=True)] for row in both]


@torch.no_grad()
def class_logits(trained: Trained, tokens: Tensor, texts: Sequence[str]) -> Tensor:
    """fp32 [B, C] of texts about images, of which ``tokens`` [B, I, P, D] are given."""
    config, num_images = trained.run.config, trained.num_images
    maker = TextRows(trained.run.tokenizer, config.data.max_text_length, num_images, lambda _: (None, {}))
    samples = [RawSample(f"text {number}", [], text, {}) for number, text in enumerate(texts)]
    images = torch.zeros((len(texts), num_images, 3, 1, 1), dtype=torch.uint8)
    batch = collate([Item(one.key, maker.rows(one, 0, None)) for one in samples], images, trained.objective.planner)
    return trained.objective.logits(batch.to(trained.device), tokens.flatten(0, 1))


@torch.no_grad()
def write(trained: Trained, pixels: Tensor, questions: Sequence[str]) -> list[Answer]:
    """The answer that is written to each question about its image or clip, uint8 [B, I, 3, S, S]."""
    run, objective = trained.run, trained.objective
    maker = written_answers.preparation(run.config, objective, run.tokenizer, lambda _: {}).maker
    samples = [RawSample(f"question {number}", [], text, {}) for number, text in enumerate(questions)]
    asked = [maker.rows(one, 0, None)[0].note["_question"] for one in samples]
    found = written_answers.write_answers(run.config, maker, objective, pixels.to(trained.device), asked)
    return [(written_answers.answer_text(maker, words), None) for words in found]
