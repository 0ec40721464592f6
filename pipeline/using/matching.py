"""How well texts describe images: by a head that was trained to say so, or by how probable the text is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.decode.likelihood import mean_log_probabilities
from model.evlgen import EVLGen
from model.objectives.captioning import Captioning
from model.objectives.classification import Classification
from model.objectives.evlgen import ImageToText
from model.objectives.pretraining import Pretraining
from model.objectives.ranking import Ranking
from pipeline.finetuning import nlvr2, snli_ve
from pipeline.using.answering import class_logits
from pipeline.using.reading import cls_features, words_of
from pipeline.using.trained import Trained

PROBABILITY = "probability that the text belongs to the image, by image-text matching"
RANK = "score of the rank head: the higher, the better a text fits an image; no probability"
ENTAILED = "probability that the image entails the text"
TRUE = "probability that the text is true of the images"
LIKELIHOOD = (
    "mean log-likelihood of the text's tokens given the image: the higher, the better; no probability of a match"
)


class Matching(NamedTuple):
    """What the scores of a model mean, and the function that gives them: fp32 [B] from what texts read of images,
    [B, I, P, D], and B texts."""

    meaning: str
    scores: Callable[[Trained, Tensor, Sequence[str]], Tensor]


def matching_of(trained: Trained) -> Matching | None:
    """How a model matches images and texts; None for one that can't."""
    objective, config = trained.objective, trained.run.config
    if isinstance(objective, Ranking):
        return Matching(RANK, _ranked)
    if isinstance(objective, Classification):
        meanings = {"snli_ve": ENTAILED, "nlvr2": TRUE}
        return Matching(meanings[objective.term], _class_probability) if objective.term in meanings else None
    if isinstance(objective, Pretraining):
        options = config.objective
        if objective.term_weights.get("itm") and options.negative_share:
            return Matching(PROBABILITY, _matched)
        return None if objective.name == "mlm" else Matching(LIKELIHOOD, _likelihood)
    writes = isinstance(objective, Captioning | ImageToText) and config.task.name in ("captioning", "pretraining")
    return Matching(LIKELIHOOD, _likelihood) if writes else None


@torch.no_grad()
def _ranked(trained: Trained, tokens: Tensor, texts: Sequence[str]) -> Tensor:
    return trained.objective.match(cls_features(trained, tokens, texts))


def _matched(trained: Trained, tokens: Tensor, texts: Sequence[str]) -> Tensor:
    return _ranked(trained, tokens, texts).sigmoid()


def _class_probability(trained: Trained, tokens: Tensor, texts: Sequence[str]) -> Tensor:
    wanted = {"snli_ve": snli_ve.LABELS["entailment"], "nlvr2": nlvr2.LABELS["True"]}[trained.objective.term]
    return class_logits(trained, tokens, texts).softmax(1)[:, wanted]


@torch.no_grad()
def _likelihood(trained: Trained, tokens: Tensor, texts: Sequence[str]) -> Tensor:
    """The prompt of the run, where it has one, is read before each text."""
    objective, config, tokenizer = trained.objective, trained.run.config, trained.run.tokenizer
    length, prompt = config.data.max_text_length, getattr(config.task, "prompt", "")
    form = getattr(objective, "form", None)
    if isinstance(objective.net, EVLGen):
        room = length - len(form.begin) - len(form.end)
    else:
        room = length - 2 - (len(form.begin) + len(form.end) if form is not None else 0)
    num_read = len(tokenizer.encode(prompt, length)) - 2 if prompt else 0
    if isinstance(objective, Pretraining) and objective.net.released:
        num_read = max(num_read, 1)  # the release never learns the first word
    words = []
    for number, text in enumerate(texts):
        cleaned = words_of(trained, text, f"text {number}")
        ids = tokenizer.encode(f"{prompt} {cleaned}" if prompt else cleaned, length + 2)[1:-1]
        words.append(ids[:room])
    return mean_log_probabilities(objective, tokens.flatten(0, 1), words, num_read).float()
