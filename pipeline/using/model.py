"""A trained model as Python code uses it: images and texts go in, captions, answers, scores and features come out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.tasks.captioning import Captioner, captioner_of
from pipeline.using import answering, describing
from pipeline.using.index import ImageIndex
from pipeline.using.matching import Matching, matching_of
from pipeline.using.pixels import batched, pixels_of, samples_of
from pipeline.using.reading import reads_texts
from pipeline.using.trained import Trained, open_trained

GIVEN_BY = {  # ability -> what a model was trained for that has it
    "caption": "task captioning, or pretraining with objective flm, ar, prefixlm, mlm or evlgen",
    "answer": "task vqa, gqa, okvqa, nlvr2 or snli_ve",
    "match": "task retrieval, nlvr2, snli_ve or captioning, or pretraining with objective flm, ar, prefixlm or evlgen",
    "features": "any task",
}
OF_PROGRAM = {  # what messages call by an option of the generate program -> the argument of ``caption``
    **{"--lengths 8 10 12": "lengths=[8, 10, 12]", "--lengths": "lengths", "--max-tokens": "max_tokens"},
    **{"no --beams, no --nucleus and no --prompt": "no beams and no prompt"},
}
Images = Any  # a PIL image, a uint8 array [H, W, 3], a path, the bytes of a file; or a list of these


def load_model(folder: str | os.PathLike[str], device: Any = None, dtype: Any = None) -> Model:
    """As ``openflm.load``."""
    return Model(open_trained(Path(folder), device, dtype))


class Model:
    """A trained model. What it can do is in ``abilities``; anything else raises a ValueError that says who can.

    ``images`` are PIL images, uint8 arrays [H, W, 3], paths, the bytes of files, or a list of these; of a model of
    clips paths or bytes of videos, or frames uint8 [F, H, W, 3]; of one that judges several images together (nlvr2) a
    list of so many. One given alone gives one result, a list a list. Nothing depends on who shares a batch, but for
    rounding. Not for several threads at a time.
    """

    def __init__(self, trained: Trained) -> None:
        self._trained = trained
        config = trained.run.config
        self.name: str = trained.run.folder.resolve().name
        self.checkpoint: Path = trained.run.checkpoint
        self.task: str = config.task.name
        self.objective: str = config.objective.name
        self.image_size: int = config.model.vision.image_size
        self.device, self.dtype = trained.device, trained.dtype
        self._lengths: dict[int | None, Sequence[int]] = {}  # of the training captions of an mlm model

    def __repr__(self) -> str:
        can = ", ".join(sorted(self.abilities))
        return f"<model {self.name}: task {self.task}, objective {self.objective}, {self.image_size} px; can {can}>"

    @cached_property
    def abilities(self) -> frozenset[str]:
        """Those of "caption", "answer", "match" and "features" that the model has."""
        has = {
            "caption": self.task in ("captioning", "pretraining") and self.objective != "qformer_stage1",
            "answer": answering.can_answer(self._trained),
            "match": self._matching is not None,
            "features": True,
        }
        return frozenset(name for name, holds in has.items() if holds)

    @property
    def match_meaning(self) -> str | None:
        """What the numbers of ``match`` are; None of a model that can't."""
        return None if self._matching is None else self._matching.meaning

    @cached_property
    def answers(self) -> list[str] | None:
        """The answers that the model chooses from; None of one that writes them, or gives none."""
        return answering.answers(self._trained)

    def caption(
        self,
        images: Images,
        prompt: str = "",
        beams: int | None = None,
        max_tokens: int | None = None,
        batch_size: int = 32,
        lengths: Sequence[int] | None = None,
    ) -> str | list[str]:
        """A caption of each image, as ``python -m pipeline.generate`` writes it.

        Args:
            images: as of the class.
            prompt: words that captions start with.
            beams: width of the beam search, 1 is greedy; None is greedy too, but for a run of captioning as its options
                say.
            max_tokens: longest caption; None is as long as in training.
            batch_size: images at a time.
            lengths: of an mlm model, which has no beams and no prompt: lengths in tokens to try; None is quantiles of
                the run's training captions, which must still be there.
        """
        self._need("caption")
        captioner = self._captioner(prompt, beams, max_tokens, lengths)
        samples, single = self._samples(images)
        found: list[str] = []
        for batch in batched(samples, batch_size):
            found += captioner.caption(self._pixels(batch, len(found)), first=len(found))
        return found[0] if single else found

    def caption_stream(self, image: Any, prompt: str = "", max_tokens: int | None = None) -> Iterator[str]:
        """The caption so far, a word or piece of one more each time; the last is ``caption(image, beams=1)``.

        An mlm model writes all words at once: there is one.
        """
        self._need("caption")
        mlm = self.objective == "mlm" and self.task == "pretraining"
        captioner = self._captioner(prompt, None if mlm else 1, max_tokens, None)
        return _changes(captioner.caption_steps(self._one(image)))

    def answer(self, images: Images, questions: str | Sequence[str], top: int = 1, batch_size: int = 32) -> Any:
        """The answer to each question about its image, with its probability (None where answers are written).

        A single image is that of all questions, a single question that of all images. With nlvr2 a question is a
        statement and the answer "true" or "false"; with snli_ve it is a hypothesis and the answer one of "entailment",
        "neutral" and "contradiction".

        Returns:
            (answer, probability) of a single question about a single image, else a list; with ``top`` above 1 a list of
            the ``top`` most probable in the place of each.
        """
        self._need("answer")
        if top < 1 or (top > 1 and self.answers is None):
            written = "; this model writes its answers, one each" if self.answers is None else ""
            raise ValueError(f"top is {top}, expected 1{written or ' or more'}")
        samples, texts, single = self._paired(images, questions, "questions")
        found: list[list[answering.Answer]] = []
        for batch in batched(list(zip(samples, texts, strict=True)), batch_size):
            pixels, which = self._distinct([sample for sample, _ in batch], len(found))
            asked = [text for _, text in batch]
            if self.answers is None:
                found += [[one] for one in answering.write(self._trained, pixels[which], asked)]
            else:
                tokens = self._trained.encode(pixels)[which.to(self.device)]
                found += answering.choose(self._trained, tokens, asked, self.answers, top)
        results = [row[0] for row in found] if top == 1 else found
        return results[0] if single else results

    def match(self, images: Images, texts: str | Sequence[str], batch_size: int = 32) -> np.ndarray:
        """How well each text describes its image, float32 [pairs], or a single number; ``match_meaning`` says what it
        is.

        A single image is that of all texts, a single text that of all images.
        """
        self._need("match")
        samples, texts, single = self._paired(images, texts, "texts")
        found: list[np.ndarray] = []
        for batch in batched(list(zip(samples, texts, strict=True)), batch_size):
            pixels, which = self._distinct([sample for sample, _ in batch], batch_size * len(found))
            tokens = self._trained.encode(pixels)[which.to(self.device)]
            found.append(self._scores(tokens, [text for _, text in batch]))
        scores = np.concatenate([np.zeros(0, np.float32), *found])
        return scores[0] if single else scores

    def index(
        self, images: Images, batch_size: int = 32, progress: Callable[[int, int], None] | None = None
    ) -> ImageIndex:
        """The images, each encoded once, to be searched by sentences: ``index.search(text, top=10)``.

        ``progress(done, total)`` is called after every batch.
        """
        self._need("match")
        samples, _ = self._samples(images)
        encoded: list[Tensor] = []
        for batch in batched(samples, batch_size):
            encoded += self._trained.encode(torch.stack(self._pixels(batch, len(encoded)))).cpu()
            if progress is not None:
                progress(len(encoded), len(samples))
        return ImageIndex(self._trained, self._matching, encoded)

    def features(
        self, images: Images = None, texts: str | Sequence[str] | None = None, batch_size: int = 32
    ) -> dict[str, np.ndarray]:
        """What the model makes of images and texts, float32, a row for each.

        Returns:
            of images "tokens" [B, P, W], those of the vision tower (of a clip their mean over its frames; of images
            that are judged together one after the other), and "image" [B, W], their mean; of texts "text" [B, D], the
            mean of their words' states before they meet an image; of both "pair" [B, D], the pooled CLS feature of each
            text with its image, where the model has one. Of a model pretrained with ``objective.itc_weight`` also
            "image_embedding" and "text_embedding" [B, E], of length 1: their product is large where a text fits an
            image. Something given alone is a batch of one.

        Raises:
            ValueError: texts for a model without a text tower (evlgen), or neither images nor texts.
        """
        if images is None and texts is None:
            raise ValueError("no images and no texts: give one of them, or both")
        parts: list[dict[str, Tensor]] = []
        if texts is not None and images is not None and reads_texts(self._trained):
            samples, texts, _ = self._paired(images, texts, "texts")
        else:
            samples = [] if images is None else self._samples(images)[0]
            texts = [texts] if isinstance(texts, str) else list(texts or ())
        for numbers in batched(range(max(len(samples), len(texts))), batch_size):
            own = slice(numbers[0], numbers[-1] + 1)
            pixels = torch.stack(self._pixels(samples[own], numbers[0])) if samples else None
            parts.append(describing.features_of(self._trained, pixels, texts[own]))
        if not parts:
            return describing.no_features(self._trained)
        return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}

    def attention(self, image: Any, text: str) -> tuple[list[str], np.ndarray]:
        """The words of a text and where each looked in the image, float32 [words, rows, columns].

        A map holds the share of each patch in what a word took, the mean over heads and layers: from the image, or with
        evlgen from the image and the words before. What it took from a class token is in no patch.

        Raises:
            ValueError: images are judged together (nlvr2), where tokens stand in the image is not known, or they are
                queries (qformer, perceiver).
        """
        return describing.attention_of(self._trained, self._one(image)[None], text)

    def merges(self, image: Any) -> np.ndarray:
        """int64 [rows, columns]: patches with equal numbers were merged into one token.

        Raises ValueError for a model that merges none.
        """
        return describing.merges_of(self._trained, self._one(image)[None])

    def pixels(self, image: Any) -> np.ndarray:
        """What the model sees of an image, uint8 [I, 3, S, S]; raises ValueError for one that can't be used."""
        return self._one(image).numpy()

    @cached_property
    def _matching(self) -> Matching | None:
        return matching_of(self._trained)

    def _need(self, ability: str) -> None:
        if ability not in self.abilities:
            can = ", ".join(sorted(self.abilities))
            raise ValueError(
                f"{self.name} is a model of task {self.task}, objective {self.objective}: it can't {ability}, only"
                f" {can}; use one of {GIVEN_BY[ability]}"
            )

    def _captioner(
        self, prompt: str, beams: int | None, max_tokens: int | None, lengths: Sequence[int] | None
    ) -> Captioner:
        run, objective, device = self._trained.run, self._trained.objective, self._trained.device
        lengths = lengths or self._lengths.get(max_tokens)
        try:
            captioner = captioner_of(run, objective, device, beams, max_tokens, prompt, lengths)
        except ValueError as error:  # the words of the program's options
            said = str(error)
            for option, argument in OF_PROGRAM.items():
                said = said.replace(option, argument)
            raise ValueError(said) from error
        if captioner.lengths:
            self._lengths.setdefault(max_tokens, captioner.lengths)
        return captioner

    def _scores(self, tokens: Tensor, texts: list[str]) -> np.ndarray:
        return self._matching.scores(self._trained, tokens, texts).float().cpu().numpy()

    def _samples(self, images: Images) -> tuple[list[Any], bool]:
        return samples_of(images, self._trained.num_images, self._trained.pictures.num_frames is not None)

    def _paired(self, images: Images, texts: str | Sequence[str], what: str) -> tuple[list[Any], list[str], bool]:
        """Samples and texts, one for one, and whether a single one of both was given."""
        samples, one_image = self._samples(images)
        one_text = isinstance(texts, str)
        texts = [texts] if one_text else list(texts)
        for number, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{what}[{number}]: expected a text of at least one word, found {text!r}")
        if one_image:
            samples = samples * len(texts)
        elif one_text:
            texts = texts * len(samples)
        if len(samples) != len(texts):
            raise ValueError(
                f"{len(samples)} images and {len(texts)} {what}: expected as many of both, or a single one of either"
            )
        return samples, texts, one_image and one_text

    def _distinct(self, samples: Sequence[Any], first: int) -> tuple[Tensor, Tensor]:
        """Pixels uint8 [U, I, 3, S, S] of the samples, each object once, and int64 [samples] which of them each is."""
        places: dict[int, int] = {}
        which = [places.setdefault(id(sample), len(places)) for sample in samples]
        chosen = {place: number for number, place in reversed(list(enumerate(which)))}
        return torch.stack([self._pixels([samples[n]], first + n)[0] for _, n in sorted(chosen.items())]), torch.tensor(
            which
        )

    def _pixels(self, samples: Sequence[Any], first: int) -> list[Tensor]:
        trained = self._trained
        named = ((sample, f"images[{first + number}]") for number, sample in enumerate(samples))
        return [pixels_of(sample, trained.num_images, trained.pictures, name) for sample, name in named]

    def _one(self, image: Any) -> Tensor:
        samples, single = self._samples(image)
        if not single:
            raise ValueError(f"expected a single image, found a list of {len(samples)}")
        return pixels_of(samples[0], self._trained.num_images, self._trained.pictures, "image")


def _changes(texts: Iterator[str]) -> Iterator[str]:
    """Texts that differ from the one before, and at least one; those that end within a character are held back."""
    last, shown = "", None
    for last in texts:
        if last and last != shown and not last.endswith("\ufffd"):
            shown = last
            yield shown
    if last != shown:
        yield last
