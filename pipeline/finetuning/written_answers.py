"""Answers to questions word by word: the question is read, the answer after it is learned and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.vqa_answers import normalise
from model.batch import Batch, Row
from model.decode.search import greedy
from model.decode.stream import decoder_of
from model.plans.builder import row_generator
from model.plans.captions import CaptionForm
from pipeline.config.options import Config, ConfigError
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.tokenizer import TextTokenizer, clean_caption
from pipeline.data.transforms import UnusableSample
from pipeline.loading.datasets import OtherRows, Preparation
from pipeline.loading.open_data import eval_loader, placeholder_batch
from pipeline.tasks.task import EvaluationPass, EvaluationRanks, Measurement, Prediction


@dataclass(frozen=True)
class AnswerRows:
    """``<s> question answer </s>``, the answer one of the question's, drawn by the seed and normalised.

    ``Row.target`` is the number of tokens that are read. A question without an answer is a row that is only read.
    """

    tokenizer: TextTokenizer
    form: CaptionForm
    max_text_length: int
    max_answer_tokens: int
    about: Callable[[RawSample], dict[str, Any]]

    def rows(self, sample: RawSample, seed: int, others: OtherRows) -> list[Row]:
        question = clean_caption(sample.text, full_stop=False)
        if not question:
            raise UnusableSample(sample.key, "empty text")
        try:
            note = self.about(sample)
        except ValueError as error:
            raise UnusableSample(sample.key, str(error)) from None
        whole = self._words(question)
        read = whole[: self.max_text_length - 2 - self.max_answer_tokens]
        answers = [answer for answer in map(normalise, note.get("answers", ())) if answer]
        note |= {"_question": read}
        if not answers:
            return [Row([*self._begin(read), self.form.vocabulary.eos_id], 0, seed, "read", sample.key, note=note)]
        answer = answers[int(row_generator(seed).integers(len(answers)))]
        words = self._words(f"{question} {answer}")
        apart = words[: len(whole)] == whole  # else the tokens of question and answer run together
        spoken = words[len(whole) :] if apart else self._words(answer)
        ids = self.form.write([*read, *spoken[: self.max_answer_tokens]], self.max_text_length)
        return [Row(ids, 0, seed, "pair", sample.key, len(self._begin(read)), note)]

    def placeholder(self, key: str) -> list[Row]:
        vocabulary = self.tokenizer.vocabulary
        return [Row([vocabulary.bos_id, vocabulary.eos_id], 0, 0, "placeholder", key)]

    def _begin(self, read: Sequence[int]) -> list[int]:
        return [self.form.vocabulary.bos_id, *self.form.begin, *read]

    def _words(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, 2**20)[1:-1]


def preparation(
    config: Config, objective: nn.Module, tokenizer: TextTokenizer, about: Callable[[RawSample], dict[str, Any]]
) -> Preparation:
    """Questions and answers as rows; ``about`` says what predictions repeat.

    Raises:
        ConfigError: no room for a question, or the released loss, which is computed for captions only.
    """
    most, length = config.task.max_answer_tokens, config.data.max_text_length
    if most > length - 3:
        raise ConfigError(
            f"task.max_answer_tokens {most} leaves no word of a question in data.max_text_length {length}"
        )
    if config.model.behaviour == "released":
        raise ConfigError("task.generative has no released behaviour; use model.behaviour default")
    maker = AnswerRows(tokenizer, objective.form, length, most, about)
    return Preparation(maker, objective.planner(), config.model.vision.image_size)


def passes(
    config: Config,
    objective: nn.Module,
    preparation: Preparation,
    held_out: Sequence[Corpus],
    ranks: EvaluationRanks,
    summarise: Callable[[list[Prediction]], dict[str, float]],
) -> list[EvaluationPass]:
    """Every question once: the loss of one of its answers, and the answer that the model writes."""
    maker = preparation.maker
    return [
        EvaluationPass(
            eval_loader(config, list(held_out), preparation, ranks.place, ranks.pin, config.task.images),
            placeholder_batch(preparation),
            partial(_measure, maker, ranks.all_agree),
            ("caption_loss", "targets"),
            partial(_values, summarise),
        )
    ]


def _measure(maker: AnswerRows, all_agree: Callable[[bool], bool], objective: nn.Module, batch: Batch) -> Measurement:
    notes = batch.notes or [None] * len(batch.images)
    questions = [[] if note is None else note["_question"] for note in notes]
    written = greedy(
        decoder_of(objective, batch.images),
        maker.max_text_length - 2,
        all_agree,
        own_words(questions).to(batch.images.device),
    )
    predictions = []
    for number, position in enumerate(batch.positions):
        if notes[number] is not None:  # an unusable sample has none
            words = written[number][len(questions[number]) :][: maker.max_answer_tokens]
            answer = clean_caption(maker.tokenizer.decode(words), full_stop=False)
            predictions.append({"position": position, "key": batch.keys[number], **notes[number], "answer": answer})
    loss, _ = objective.score(batch)["caption"]
    return Measurement({"caption_loss": loss, "targets": batch.counts["caption"]}, predictions)


def own_words(sequences: Sequence[Sequence[int]]) -> Tensor:
    """int64 [B, F] for :func:`model.decode.search.greedy`: the words of each, then -1."""
    longest = max(map(len, sequences), default=0)
    return torch.tensor([[*words, *[-1] * (longest - len(words))] for words in sequences], dtype=torch.int64)


def _values(
    summarise: Callable[[list[Prediction]], dict[str, float]],
    totals: Mapping[str, float],
    predictions: list[Prediction],
) -> dict[str, float]:
    loss = {"loss": totals["caption_loss"] / totals["targets"]} if totals["targets"] else {}
    return loss | summarise(predictions)
