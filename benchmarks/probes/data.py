"""What every probe of a speedrun is measured on: the same images, questions, pairs and references for all models."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from model.vision.tower import tokens_of
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import clean_caption
from pipeline.tasks.captioning import Captioner, Item, items_of_corpora

UNKNOWN = -1  # label of an answer that no training question has


@dataclass
class Reader:
    """One text to be read with an image: ``image`` its number in the split, ``label`` its class."""

    image: int
    text: str
    label: int


@dataclass
class Split:
    """Images of a split and what is asked about them."""

    items: list[Item]
    pairs: list[Reader]  # label 1: own caption, 0: another image's
    questions: list[Reader] = field(default_factory=list)
    types: list[str] = field(default_factory=list)  # of the questions


@dataclass
class ProbeData:
    """``train`` fits the probes, ``test`` is held out; ``answers`` are the classes of the questions."""

    train: Split
    test: Split
    answers: list[str]
    captioned: list[Item]

    @property
    def blind_accuracy(self) -> float:
        """Of an answerer who sees the type of each question only: the most frequent training answer of its type."""
        frequent: dict[str, Counter] = defaultdict(Counter)
        for question, kind in zip(self.train.questions, self.train.types, strict=True):
            frequent[kind][question.label] += 1
        right = [
            bool(frequent[kind]) and frequent[kind].most_common(1)[0][0] == question.label
            for question, kind in zip(self.test.questions, self.test.types, strict=True)
        ]
        return sum(right) / len(right)


def choose(
    train: Sequence[Corpus],
    test: Sequence[Corpus],
    captioner: Captioner,
    train_images: int,
    test_images: int,
    caption_images: int,
) -> ProbeData:
    """Images spread evenly over both splits; all their questions; for each its caption and another image's.

    Raises:
        ValueError: fewer than two usable images in a split.
    """
    splits = []
    for corpora, count in ((train, train_images), (test, max(test_images, caption_images))):
        items = list(items_of_corpora(corpora, count, captioner))
        if len(items) < 2:
            raise ValueError(f"{corpora[0].split_dir}: found {len(items)} usable images, probes need at least 2")
        splits.append(items)
    captioned = _evenly(splits[1], caption_images)
    splits[1] = _evenly(splits[1], test_images)
    asked = [_questions(items) for items in splits]
    answers = sorted({question["answer"] for _, question in asked[0]})
    classes = {answer: number for number, answer in enumerate(answers)}
    made = []
    for items, questions in zip(splits, asked, strict=True):
        readers = [Reader(image, q["question"], classes.get(q["answer"], UNKNOWN)) for image, q in questions]
        made.append(Split(items, _pairs(items), readers, [str(q.get("type", "")) for _, q in questions]))
    return ProbeData(*made, answers, captioned)


@torch.inference_mode()
def encoded(data: ProbeData, captioner: Captioner, at_a_time: int = 32) -> ProbeData:
    """The same with the tokens [I, P, W] of a frozen vision tower in the place of pixels, as all checkpoints have the
    same."""
    tower, known = captioner.objective.net.vision, {}

    def of(items: list[Item]) -> list[Item]:
        new = [item for item in items if id(item) not in known]
        for first in range(0, len(new), at_a_time):
            part = new[first : first + at_a_time]
            pixels = torch.stack([item.pixels for item in part]).to(captioner.device)
            tokens = tokens_of(tower, pixels).unflatten(0, pixels.shape[:2]).cpu()
            known.update({id(item): item._replace(pixels=one) for item, one in zip(part, tokens, strict=True)})
        return [known[id(item)] for item in items]

    train, test = (replace(split, items=of(split.items)) for split in (data.train, data.test))
    return replace(data, train=train, test=test, captioned=of(data.captioned))


def _evenly(items: list[Item], count: int) -> list[Item]:
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _questions(items: Sequence[Item]) -> list[tuple[int, dict[str, str]]]:
    """(image, question) of every well-formed entry of ``questions`` in the samples' metadata."""
    found = []
    for image, item in enumerate(items):
        listed = item.meta.get("questions")
        for question in listed if isinstance(listed, list) else ():
            if isinstance(question, dict) and all(
                isinstance(question.get(key), str) and question[key].strip() for key in ("question", "answer")
            ):
                found.append((image, question))
    return found


def _pairs(items: Sequence[Item]) -> list[Reader]:
    """For each image its first caption, and the first caption of the image half the split away that is none of its."""
    pairs = []
    for number, item in enumerate(items):
        own = {_normal(reference) for reference in item.references}
        pairs.append(Reader(number, item.references[0], 1))
        for step in range(len(items)):
            other = items[(number + len(items) // 2 + step) % len(items)].references[0]
            if _normal(other) not in own:
                pairs.append(Reader(number, other, 0))
                break
    return pairs


def _normal(caption: str) -> str:
    return clean_caption(caption, False).lower().rstrip(". ")
