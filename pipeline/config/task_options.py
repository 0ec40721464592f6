"""Options of the tasks: what is trained and scored, a dataclass each, chosen by ``task.name``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Decoding = Literal["greedy", "beam", "released_beam", "nucleus", "both_ways"]
ANSWER_SEARCHES = ("greedy", "beam", "released_beam")
NEEDS_R2L = "greedy, beam or nucleus, as task.r2l_weight 0 trains no reverse stream; or give --task.r2l_weight 1 too"


def scoring(default: Any) -> Any:
    """A field of an option that changes how a model is scored, not what a training step computes."""
    return field(default=default, metadata={"scoring": True})


@dataclass
class TaskOptions:
    """What a run is for: pretraining, or fine-tuning on one of the downstream tasks.

    Args:
        name: task; it decides which of the options below there are.
    """

    name: Literal["pretraining", "vqa", "gqa", "okvqa", "nlvr2", "snli_ve", "captioning", "retrieval"] = "pretraining"

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
        generative: write the answer word by word instead of choosing it from the list; evlgen always does.
        max_answer_tokens: longest answer that is written.
        question_prompt: what is read of a question that is answered in words, {} for the question itself; null is what
            its language model is asked by (evlgen), or else the question alone.
        decoding: how texts are searched for when they are scored; released_beam goes by the rules of transformers' beam
            search, by which EVLGen's release decoded; both_ways takes of all beams the caption that the reverse stream
            of flm finds probable too. Answers: greedy, and with evlgen beam or released_beam too.
        beams: width of the beam search.
        length_penalty: a beam is worth its log probability over its length to this power.
        repetition_penalty: above 1 makes a word that is there already less probable; EVLGen's release has 1.5 with
            Vicuna. Not of nucleus.
    """

    name: Literal["vqa"] = "vqa"
    answers: str | None = scoring(None)  # its content is in a run's fingerprint, not its path
    generative: bool = False
    max_answer_tokens: PositiveInt = scoring(10)
    question_prompt: str | None = None
    decoding: Decoding = scoring("greedy")
    beams: PositiveInt = scoring(3)
    length_penalty: NonNegativeFloat = scoring(1.0)
    repetition_penalty: PositiveFloat = scoring(1.0)

    def check(self) -> None:
        prompt = self.question_prompt
        self._expect("question_prompt", prompt is None or prompt.count("{}") == 1, "a text that holds {} once")
        self._expect("decoding", self.decoding in ANSWER_SEARCHES, "greedy, beam or released_beam for answers")
        _check_search(self)


@dataclass
class GQAOptions(VQAOptions):
    """Options of gqa, questions about images with one right answer each: those of vqa."""

    name: Literal["gqa"] = "gqa"


@dataclass
class OKVQAOptions(VQAOptions):
    """Options of okvqa, questions about images that ask for knowledge: those of vqa."""

    name: Literal["okvqa"] = "okvqa"


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
        decoding: how captions are searched for when they are scored; released_beam goes by the rules of transformers'
            beam search, by which EVLGen's release decoded; both_ways takes of all beams the one that the reverse stream
            of flm finds probable too.
        beams: width of the beam search; both_ways chooses among as many captions.
        length_penalty: a beam is worth its log probability over its length to this power.
        repetition_penalty: above 1 makes a word that is there already less probable; EVLGen's release has 1.5 with
            Vicuna. Not of nucleus.
        l2r_score_weight: of the log probability by the forward stream, in both_ways.
        r2l_score_weight: the same of the reverse stream, which needs task.r2l_weight.
        reconstruction_score_weight: the same of the reconstructor, each word from all the others; it needs
            task.reconstruction_weight.
        top_p: nucleus samples from the fewest most probable tokens that hold this much probability.
        temperature: divides the scores that nucleus samples from.
        max_tokens: longest caption in tokens.
        min_tokens: no caption ends before it has so many, the prompt's included.
        r2l_weight: of the reverse stream's loss in training, beside the 1 of the forward stream's; 0 leaves that stream
            out of the network. Of flm in default behaviour only.
        reconstruction_weight: the same of the reconstructor; it needs r2l_weight.
        self_critical: train on the CIDEr-D of sampled captions, over that of the greedy one.
        document_frequencies: file of document frequencies for that reward; null counts the training captions.
    """

    name: Literal["captioning"] = "captioning"
    prompt: str = ""
    decoding: Decoding = scoring("greedy")
    beams: PositiveInt = scoring(3)
    length_penalty: NonNegativeFloat = scoring(1.0)
    repetition_penalty: PositiveFloat = scoring(1.0)
    l2r_score_weight: NonNegativeFloat = scoring(1.0)
    r2l_score_weight: NonNegativeFloat = scoring(1.0)
    reconstruction_score_weight: NonNegativeFloat = scoring(0.0)
    top_p: PositiveFloat = scoring(0.9)
    temperature: PositiveFloat = scoring(1.0)
    max_tokens: PositiveInt = scoring(30)
    min_tokens: NonNegativeInt = scoring(0)
    r2l_weight: NonNegativeFloat = 0.0
    reconstruction_weight: NonNegativeFloat = 0.0
    self_critical: bool = False
    document_frequencies: str | None = None

    def check(self) -> None:
        self._expect("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        most = f"at most task.max_tokens ({self.max_tokens})"
        self._expect("min_tokens", self.min_tokens <= self.max_tokens, most)
        _check_search(self)
        has_r2l = self.r2l_weight > 0
        self._expect("reconstruction_weight", has_r2l or not self.reconstruction_weight, "0 with task.r2l_weight 0")
        self._expect("decoding", has_r2l or self.decoding != "both_ways", NEEDS_R2L)


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


def _check_search(options: VQAOptions | CaptioningOptions) -> None:
    """Raises ValueError for a penalty that the search does not have."""
    has_it = options.decoding != "nucleus" or options.repetition_penalty == 1
    options._expect("repetition_penalty", has_it, "1 with task.decoding nucleus, which has none")


TASK_OPTIONS_OF: dict[str, type[TaskOptions]] = {
    "pretraining": PretrainingOptions,
    "vqa": VQAOptions,
    "gqa": GQAOptions,
    "okvqa": OKVQAOptions,
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
