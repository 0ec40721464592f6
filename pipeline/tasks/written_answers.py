"""Answers to questions word by word: the question is read, the answer after it is learned and written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.vqa_answers import normalise
from model.batch import Batch, Row
from model.decode.language import LanguageDecoder
from model.decode.search import alone, greedy
from model.decode.stream import decoder_of
from model.plans.builder import row_generator
from pipeline.config.options import Config, ConfigError, reads_by_language_model
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.tokenizer import TextTokenizer, clean_caption
from pipeline.data.transforms import UnusableSample
from pipeline.loading.datasets import OtherRows, Preparation
from pipeline.loading.open_data import eval_loader, placeholder_batch
from pipeline.tasks.searching import decoding, most_probable
from pipeline.tasks.task import EvaluationPass, EvaluationRanks, Measurement, Prediction

RELEASED_WORDS = 50  # of a question at most

About = Callable[[RawSample], dict[str, Any]]


@dataclass(frozen=True)
class AnswerRows:
    """A question as the prompt asks it, then an answer: one of the question's, drawn by the seed and normalised.

    ``begin`` and ``end`` are what a text's form has before and behind its words; with ``begin`` at most ``most_read``
    tokens are read. What is too long loses words of the question, or with ``cuts_prompt`` tokens at the end of all.
    ``Row.target`` is the number of tokens that are read. A question without an answer is a row that is only read.
    """

    tokenizer: TextTokenizer
    begin: tuple[int, ...]
    end: tuple[int, ...]
    most_read: int
    max_answer_tokens: int
    about: About
    prompt: str = "{}"
    cuts_prompt: bool = False
    clean: Callable[[str], str] = partial(clean_caption, full_stop=False)

    def rows(self, sample: RawSample, seed: int, others: OtherRows) -> list[Row]:
        question = self.clean(sample.text)
        if not question:
            raise UnusableSample(sample.key, "empty text")
        try:
            note = self.about(sample)
        except ValueError as error:
            raise UnusableSample(sample.key, str(error)) from None
        asked = self.asked(question)
        whole = self._words(asked)
        read = whole[: self.room]
        answers = [answer for answer in map(normalise, note.get("answers", ())) if answer]
        note |= {"_question": read}
        if not answers:
            return [Row([*self.begin, *read, *self.end], 0, seed, "read", sample.key, note=note)]
        answer = answers[int(row_generator(seed).integers(len(answers)))]
        words = self._words(f"{asked} {answer}")
        apart = words[: len(whole)] == whole  # else the tokens of question and answer run together
        spoken = words[len(whole) :] if apart else self._words(answer)
        ids = [*self.begin, *read, *spoken[: self.max_answer_tokens], *self.end]
        return [Row(ids, 0, seed, "pair", sample.key, len(self.begin) + len(read), note)]

    def asked(self, question: str) -> str:
        """The prompt with the question, which loses its last words where the end of the prompt would be lost."""
        words = question.split()
        kept_whole = self.cuts_prompt or self.prompt.endswith("{}")
        while not kept_whole and len(words) > 1 and len(self._words(self._with(words))) > self.room:
            words.pop()
        return self._with(words)

    def placeholder(self, key: str) -> list[Row]:
        return [Row([*self.begin, *self.end], 0, 0, "placeholder", key)]

    @property
    def room(self) -> int:
        """Tokens that prompt and question may have."""
        return self.most_read - len(self.begin)

    def _with(self, words: Sequence[str]) -> str:
        return self.prompt.replace("{}", " ".join(words))

    def _words(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, 2**20)[1:-1]


def writes_answers(config: Config) -> bool:
    """Whether answers are written word by word; else they are chosen from a list."""
    return config.task.generative or reads_by_language_model(config)


def preparation(config: Config, objective: nn.Module, tokenizer: TextTokenizer, about: About) -> Preparation:
    """Questions and answers as rows; ``about`` says what predictions repeat.

    Raises:
        ConfigError: no room for a question, options that the model does not have, or the released loss of a text tower,
            which is computed for captions only.
    """
    prepared = _for_language_model if reads_by_language_model(config) else _for_stream
    maker, planner = prepared(config, objective, tokenizer, about)
    if maker.prompt != "{}" and len(tokenizer.encode(maker.asked("a"), 2**20)) - 2 > maker.room:
        raise ConfigError(
            f"the prompt {maker.prompt!r} leaves no word of a question in data.max_text_length"
            f" {config.data.max_text_length}; raise it, or use a shorter --task.question_prompt"
        )
    return Preparation(maker, planner, config.model.vision.image_size)


def _for_stream(config: Config, objective: nn.Module, tokenizer: TextTokenizer, about: About) -> tuple[AnswerRows, Any]:
    """Question and answer together are at most ``data.max_text_length`` tokens."""
    most, length = config.task.max_answer_tokens, config.data.max_text_length
    if most > length - 3:
        raise ConfigError(
            f"task.max_answer_tokens {most} leaves no word of a question in data.max_text_length {length}"
        )
    if config.model.behaviour == "released":
        raise ConfigError("task.generative has no released behaviour; use model.behaviour default")
    if config.task.decoding != "greedy":
        raise ConfigError(
            f"task.decoding {config.task.decoding} of answers is for objective.name evlgen; use task.decoding greedy"
        )
    vocabulary = objective.form.vocabulary
    begin, end = (vocabulary.bos_id, *objective.form.begin), (vocabulary.eos_id,)
    maker = AnswerRows(tokenizer, begin, end, length - 1 - most, most, about, config.task.question_prompt or "{}")
    return maker, objective.planner()


def _for_language_model(
    config: Config, objective: nn.Module, tokenizer: TextTokenizer, about: About
) -> tuple[AnswerRows, Any]:
    """``data.max_text_length`` is of what is read; the answer comes on top, as in the release."""
    most, length, net = config.task.max_answer_tokens, config.data.max_text_length, objective.net
    released, form = config.model.behaviour == "released", net.form
    prompt = config.task.question_prompt or form.question
    maker = AnswerRows(
        *(tokenizer, form.begin, form.end, length, most, about, prompt),
        cuts_prompt=released,
        **({"clean": released_question} if released else {}),
    )
    positions = net.language.max_length
    needed = len(form.before) + net.connector.num_tokens + length + most + len(form.end)
    if positions is not None and needed > positions:
        raise ConfigError(
            f"task.max_answer_tokens {most} behind an image and data.max_text_length {length} needs {needed} positions,"
            f" the language model has {positions}; lower one of them"
        )
    return maker, objective.planner


def released_question(question: str) -> str:
    """A question as the release of EVLGen cleans it: lower case, without ten marks, at most 50 words."""
    question = re.sub(r'[.!"()*#:;~]', "", question.lower())
    return " ".join(question.split()[:RELEASED_WORDS])


def protocol(config: Config) -> dict[str, Any]:
    """How written answers come about, for the scorecard."""
    task = config.task
    asked = task.question_prompt or ("that of its language model" if reads_by_language_model(config) else "{}")
    found = {"answers": f"written, at most {task.max_answer_tokens} tokens, {task.decoding}", "prompt": asked}
    return found if task.decoding == "greedy" else found | {"decoding": decoding(task)}


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
            partial(_measure, config, maker, ranks.all_agree),
            ("caption_loss", "targets"),
            partial(_values, summarise),
        )
    ]


def _measure(
    config: Config, maker: AnswerRows, all_agree: Callable[[bool], bool], objective: nn.Module, batch: Batch
) -> Measurement:
    notes = batch.notes or [None] * len(batch.images)
    questions = [[] if note is None else note["_question"] for note in notes]
    written, loss = _written_with_loss(config, maker, all_agree, objective, batch, questions)
    predictions = []
    for number, position in enumerate(batch.positions):
        if notes[number] is not None:  # an unusable sample has none
            about = {"position": position, "key": batch.keys[number], **notes[number]}
            predictions.append(about | {"answer": answer_text(maker, written[number])})
    return Measurement({"caption_loss": loss, "targets": batch.counts["caption"]}, predictions)


def answer_text(maker: AnswerRows, words: Sequence[int]) -> str:
    """The answer that written token ids are."""
    return clean_caption(maker.tokenizer.decode(list(words[: maker.max_answer_tokens])), full_stop=False)


def _written_with_loss(
    config: Config,
    maker: AnswerRows,
    all_agree: Callable[[bool], bool],
    objective: nn.Module,
    batch: Batch,
    questions: list[list[int]],
) -> tuple[list[list[int]], Tensor]:
    """Answers, and the sum of losses; a language model's image tokens are computed once for both."""
    if not reads_by_language_model(config):
        written = by_stream(maker, objective, batch.images, questions, all_agree)
        return written, objective.score(batch)["caption"][0]
    tokens = objective.net.encode_each_once(batch.images)
    written = by_language_model(config, maker, objective, tokens, questions, all_agree)
    return written, objective.score(batch, tokens)["caption"][0]


def write_answers(
    config: Config, maker: AnswerRows, objective: nn.Module, images: Tensor, questions: list[list[int]]
) -> list[list[int]]:
    """Token ids of the answer to each question, of which ``maker`` gave the ids; images uint8 [B, I, 3, S, S]."""
    if not reads_by_language_model(config):
        return by_stream(maker, objective, images, questions)
    return by_language_model(config, maker, objective, objective.net.encode_each_once(images), questions)


def by_stream(
    maker: AnswerRows,
    objective: nn.Module,
    images: Tensor,
    questions: list[list[int]],
    all_agree: Callable[[bool], bool] = alone,
) -> list[list[int]]:
    """Answers of the l2r stream, which reads a question word by word."""
    most = maker.most_read - 1 + maker.max_answer_tokens
    read = own_words(questions).to(images.device)
    found = greedy(decoder_of(objective, images), most, all_agree, read)
    return [words[len(read) :] for words, read in zip(found, questions, strict=True)]


def by_language_model(
    config: Config,
    maker: AnswerRows,
    objective: nn.Module,
    tokens: Tensor,
    questions: list[list[int]],
    all_agree: Callable[[bool], bool] = alone,
) -> list[list[int]]:
    """Answers of a language model, which reads image ``tokens`` and a question at once."""
    decoder = LanguageDecoder(objective.net, tokens, questions=questions)
    return most_probable(config.task, decoder, maker.max_answer_tokens, all_agree)


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
