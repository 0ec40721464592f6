"""What several runs say of the same samples: captions of RUN/samples.json, examples of evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.comparing.runs import Compared
from pipeline.reporting.formats import is_finite, number

MOST_SHOWN = 24  # of a source


@dataclass
class Sample:
    """A picture (JPEG in base64), what is asked of it, what is right, and (number of the run, what it says, note)."""

    key: str
    picture: str
    text: str
    truth: list[str]
    said: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass
class Source:
    """Samples of one source that two runs have, and how many more there are."""

    title: str
    samples: list[Sample]
    more: int


def same_samples(runs: Sequence[Compared]) -> list[Source]:
    """Captions first, then examples by evaluation; samples in the order of the runs that have them first."""
    sources: dict[str, dict[tuple[str, str], Sample]] = {}
    for place, one in enumerate(runs):
        for title, sample, said, note in [*_captioned(one), *_examples(one)]:
            known = sources.setdefault(title, {}).setdefault((sample.key, sample.text), sample)
            if all(number_of != place for number_of, *_ in known.said):
                known.said.append((place, said, note))
    found = []
    for title, samples in sources.items():
        shared = [sample for sample in samples.values() if len(sample.said) > 1]
        if shared:
            found.append(Source(title, shared[:MOST_SHOWN], max(0, len(shared) - MOST_SHOWN)))
    return found


def _captioned(one: Compared) -> Iterator[tuple[str, Sample, str, str]]:
    listed = one.run.samples.get("samples")
    for sample in listed if isinstance(listed, list) else []:
        if isinstance(sample, dict) and {"key", "caption"} <= sample.keys():
            picture, truth = str(sample.get("thumbnail") or ""), _texts(sample.get("references"))
            score = sample.get("cider_d")
            note = f"CIDEr-D {number(score)}" if is_finite(score) else ""
            yield "Captions", Sample(str(sample["key"]), picture, "", truth), str(sample["caption"]), note


def _examples(one: Compared) -> Iterator[tuple[str, Sample, str, str]]:
    for evaluation in one.evaluations:
        for _, examples in evaluation.groups:
            for example in examples:
                picture = example.pictures[0].thumbnail if example.pictures else ""
                sample = Sample(example.key, picture, example.text, example.truth)
                yield evaluation.title, sample, example.prediction, example.note


def _texts(value: Any) -> list[str]:
    return [str(text) for text in value] if isinstance(value, list) else []
