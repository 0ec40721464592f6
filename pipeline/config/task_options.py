"""Options of the tasks: what is trained and scored, a dataclass each, chosen by ``task.name``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt


def scoring(default: Any) -> Any:
    """A field of an option that changes how a model is scored, not what a training step computes."""
    return field(default=default, metadata={"scoring": True})


@dataclass
class TaskOptions:
    """What a run is for: pretraining, or fine-tuning on one of the downstream tasks.

    Args:
        name: task; it decides which of the options below there are.
    """

    name: Literal["pretraining", "vqa", "nlvr2", "snli_ve", "captioning", "retrieval"] = "pretraining"

    def check(self) -> None:
        """Raises ValueError for a number out of its range."""

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"task.{name} is {getattr(self, name)}, expected {expected}")


@dataclass
class PretrainingOptions(TaskOptions):
    """Options of pretraining: none, see section objective."""

    name: Literal["pretraining"] = "pretraining"


@dataclass
class TextsOfImagesOptions(TaskOptions):
    """What the tasks share that judge a text about its images.

    Args:
        images: what is scored: each text with its own images, as controls with another sample's or with black ones.
    """

    images: Literal["own", "shuffled", "hidden"] = scoring("own")


@dataclass
class VQAOptions(TextsOfImagesOptions):
    """Options of vqa: questions about images, answers out of a list.

    Args:
        answers: list of answers made by `python -m data_prep vqav2`; null is answers.json in or above the first data
            path.
        generative: write the answer word by word instead of choosing it from the list.
        max_answer_tokens: longest answer that is written (generative).
    """

    name: Literal["vqa"] = "vqa"
    answers: str | None = scoring(None)  # its content is in a run's fingerprint, not its path
    generative: bool = False
    max_answer_tokens: PositiveInt = scoring(10)


@dataclass
class NLVR2Options(TextsOfImagesOptions):
    """Options of nlvr2, true or false statements about several images.

    Args:
        num_images: images of one statement: 2 in NLVR2 itself.
    """

    name: Literal["nlvr2"] = "nlvr2"
    num_images: PositiveInt = 2


@dataclass
class SNLIVEOptions(TextsOfImagesOptions):
    """Options of snli_ve, whether an image entails a hypothesis."""

    name: Literal["snli_ve"] = "snli_ve"


@dataclass
class CaptioningOptions(TaskOptions):
    """Options of captioning.

    Args:
        prompt: words that every caption starts with; they are read, not predicted.
        decoding: how captions are searched for when they are scored.
        beams: width of the beam search.
        length_penalty: a beam is worth its log probability over its length to this power.
        top_p: nucleus samples from the fewest most probable tokens that hold this much probability.
        temperature: divides the scores that nucleus samples from.
        max_tokens: longest caption in tokens.
        self_critical: train on the CIDEr-D of sampled captions, over that of the greedy one.
        document_frequencies: file of document frequencies for that reward; null counts the training captions.
    """

    name: Literal["captioning"] = "captioning"
    prompt: str = ""
    decoding: Literal["greedy", "beam", "nucleus"] = scoring("greedy")
    beams: PositiveInt = scoring(3)
    length_penalty: NonNegativeFloat = scoring(1.0)
    top_p: PositiveFloat = scoring(0.9)
    temperature: PositiveFloat = scoring(1.0)
    max_tokens: PositiveInt = scoring(30)
    self_critical: bool = False
    document_frequencies: str | None = None

    def check(self) -> None:
        self._expect("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")


@dataclass
class RetrievalOptions(TaskOptions):
    """Options of retrieval.

    Args:
        negatives: corpus draws wrong captions from the whole corpus, corpus_hard keeps of task.pool drawn ones those
            most like the own caption, in_batch takes the captions and images of the micro-batch.
        num_negatives: wrong captions (in_batch: and wrong images) for each right one.
        pool: captions drawn for corpus_hard to choose from.
    """

    name: Literal["retrieval"] = "retrieval"
    negatives: Literal["corpus", "corpus_hard", "in_batch"] = "corpus"
    num_negatives: PositiveInt = 15
    pool: PositiveInt = 64

    def check(self) -> None:
        self._expect("pool", self.pool >= self.num_negatives, f"at least task.num_negatives ({self.num_negatives})")


TASK_OPTIONS_OF: dict[str, type[TaskOptions]] = {
    "pretraining": PretrainingOptions,
    "vqa": VQAOptions,
    "nlvr2": NLVR2Options,
    "snli_ve": SNLIVEOptions,
    "captioning": CaptioningOptions,
    "retrieval": RetrievalOptions,
}


def names_of_scoring(task: TaskOptions) -> list[str]:
    """Options of a task that say how it is scored: a run may go on with others."""
    return [item.name for item in fields(task) if item.metadata.get("scoring")]


def task_options(name: str = "pretraining", **options: Any) -> TaskOptions:
    """The options of the task ``name``; raises TypeError for one that it does not have."""
    return TASK_OPTIONS_OF[name](**options)
