"""The task of retrieval: an image finds its captions, a caption its image, by exact scores of all pairs.

deepspeed pipeline/train.py --recipe flickr8k_retrieval --data DIR --model.weights RUN ...
python -m pipeline.evaluate --run RUN --task retrieval --split test
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.manifest import write_atomically
from model.batch import Batch, Row
from model.build import build_ranking
from model.config import Vocabulary
from model.scoring.pairs import Captions, encode_captions, encode_image, score_captions
from pipeline.config.options import Config, ConfigError
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.tokenizer import TextTokenizer, clean_caption
from pipeline.data.transforms import UnusableSample
from pipeline.finetuning.ranking_rows import ImageRows, RankingRows
from pipeline.loading.datasets import Preparation
from pipeline.loading.open_data import eval_loader
from pipeline.metrics import recall
from pipeline.tasks.task import EvaluationPass, EvaluationRanks, Measurement, Prediction, Score

SHOWN = 5  # captions of an image in predictions.jsonl
SCORES = ("mean_recall", *(f"{side}_at_{k}" for k in recall.KS for side in ("tr", "ir")))


class Retrieval:
    """Image-text retrieval, fine-tuned on rankings of captions (and of images), scored by all pairs of a split."""

    num_images = 1

    def build(self, config: Config, vocabulary: Vocabulary) -> nn.Module:
        options = config.task
        in_batch = options.num_negatives if options.negatives == "in_batch" else None
        return build_ranking(config.model, config.objective, vocabulary, config.data.max_text_length, in_batch)

    def preparation(self, config: Config, objective: nn.Module, tokenizer: TextTokenizer) -> Preparation:
        options = config.task
        maker = RankingRows(
            tokenizer,
            config.data.max_text_length,
            num_negatives=0 if options.negatives == "in_batch" else options.num_negatives,
            pool=options.pool if options.negatives == "corpus_hard" else 0,
            released=config.model.behaviour == "released",
        )
        return Preparation(maker, objective.planner, config.model.vision.image_size)

    def scores(self, objective: nn.Module) -> tuple[Score, ...]:
        return tuple(Score(name, True) for name in SCORES)

    def passes(
        self,
        config: Config,
        objective: nn.Module,
        preparation: Preparation,
        held_out: Sequence[Corpus],
        ranks: EvaluationRanks,
    ) -> list[EvaluationPass]:
        """Every image of the split, or of ``train.eval_samples`` of its images, with every caption of these images."""
        images = dataclasses.replace(preparation, maker=ImageRows(), planner=images_only)
        batches = eval_loader(config, list(held_out), images, ranks.place, ranks.pin, texts_per_image=1)
        size = preparation.image_size
        spare = images_only(torch.zeros((1, 1, 3, size, size), dtype=torch.uint8), [])
        gallery = Gallery(list(held_out), batches.dataset.rows(), preparation.maker)
        sweep = Sweep(gallery, ranks.all_agree)
        return [
            EvaluationPass(batches, spare, sweep.measure, (), sweep.summarise, write=sweep.write, begin=sweep.begin)
        ]

    def protocol(self, config: Config) -> dict[str, Any]:
        """How the scores come about, for the scorecard."""
        return {
            "scored": "every image of the split with every caption of it, none left out, no first stage",
            "score": "rank head; of a model that never had one: log-odds of image-text matching",
            "hit": "image to text: one of the image's captions among the first k; text to image: the caption's image",
            "ties": "a wrong candidate with the score of the right one ranks before it",
            "starting_weights": config.model.weights or "random, or those of the towers",
        }


def images_only(images: Tensor, rows: list[Row]) -> Batch:
    """A planner: images without text."""
    return Batch(images, {})


@dataclass
class Gallery:
    """The images of an evaluation, (corpus, row of the first caption) by position, and all their captions."""

    corpora: list[Corpus]
    rows: list[tuple[int, int]]
    maker: RankingRows

    @cached_property
    def _read(self) -> tuple[list[Any], list[list[int]], np.ndarray]:
        """Name of each image; token ids of each caption; int64 [captions] position of its image.

        Captions that can't be read are left out. Raises ConfigError for an image that is there twice.
        """
        names: list[Any] = [None] * len(self.rows)
        ids: list[list[int]] = []
        owner: list[int] = []
        place_of: dict[tuple[int, str], int] = {}
        ends = [np.append(corpus.first_rows()[1:], len(corpus)) for corpus in self.corpora]
        for position, (number, first) in enumerate(self.rows):
            for sample in self._texts(
                number, range(first, ends[number][np.searchsorted(ends[number], first, "right")])
            ):
                names[position] = sample.meta.get("image_id", sample.key)
                text = clean_caption(sample.text, self.maker.released)
                if text:
                    ids.append(self.maker.tokenizer.encode(text, self.maker.max_text_length))
                    owner.append(position)
            name = (number, str(names[position]))
            if names[position] is not None and place_of.setdefault(name, position) != position:
                raise ConfigError(
                    f"image {name[1]} stands twice in {self.corpora[number].split_dir}, its captions would count as"
                    " wrong ones of each other; prepare the split again"
                )
        return names, ids, np.array(owner, dtype=np.int64)

    def _texts(self, number: int, rows: range) -> Iterator[RawSample]:
        for row in rows:
            try:
                yield self.corpora[number].read_without_images(row)
            except UnusableSample:
                continue  # where the image can't be read either, the loader counts it

    @property
    def names(self) -> list[Any]:
        return self._read[0]

    @property
    def token_ids(self) -> list[list[int]]:
        return self._read[1]

    @property
    def image_of_caption(self) -> np.ndarray:
        return self._read[2]


class Sweep:
    """One evaluation: captions are encoded once, then each image is scored with all of them."""

    def __init__(self, gallery: Gallery, all_agree: Callable[[bool], bool]) -> None:
        self.gallery, self._all_agree = gallery, all_agree
        self._captions: Captions | None = None

    def begin(self, objective: nn.Module) -> None:
        self._captions = encode_captions(objective.net, objective.reading_planner, self.gallery.token_ids)

    def measure(self, objective: nn.Module, batch: Batch) -> Measurement:
        """Scores of each image of the batch; one by one, so that they do not depend on who shares it.

        Ranks that share one network compute as often as the one with most images.
        """
        unusable = {key for key, _ in batch.problems}
        wanted = [number for number, key in enumerate(batch.keys) if key not in unusable]
        predictions: list[Prediction] = []
        while not self._all_agree(len(predictions) == len(wanted)):
            done = len(predictions) == len(wanted)
            number = 0 if done else wanted[len(predictions)]
            image = encode_image(objective.net, batch.images[number, 0])
            scores = score_captions(objective.net, objective.match, self._captions, image)
            if not done:
                found = self._found(batch.positions[number], scores.cpu().numpy())
                predictions.append({"key": batch.keys[number], **found})
        return Measurement({}, predictions)

    def _found(self, position: int, scores: np.ndarray) -> Prediction:
        """What is said of an image: the best captions, and the rank of the best of its own (1 is first)."""
        gallery, own = self.gallery, self.gallery.image_of_caption == position
        best = np.argsort(-scores, kind="stable")[:SHOWN]
        rank = 1 + int((scores[~own] >= scores[own].max()).sum()) if own.any() else None
        return {
            "position": position,
            "image_id": gallery.names[position],
            "rank": rank,
            "captions": [gallery.maker.tokenizer.decode(gallery.token_ids[number]) for number in best],
            "right": own[best].tolist(),
            "_scores": scores,
        }

    def write(self, folder: Path, predictions: list[Prediction]) -> None:
        """scores.npy, fp32 [images, captions], beside captions.json: of each column the position of its image."""
        owners, scores = matrix(predictions, self.gallery.image_of_caption)
        stream = io.BytesIO()
        np.save(stream, scores)
        write_atomically(folder / "scores.npy", stream.getvalue())
        write_atomically(folder / "captions.json", json.dumps({"image_of_caption": owners.tolist()}) + "\n")

    def summarise(self, totals: Mapping[str, float], predictions: list[Prediction]) -> dict[str, float]:
        """Recalls (pipeline/metrics/recall.py) with standard errors, and how many images and captions they are of.

        An image that could not be read is left out with its captions.
        """
        owners, scores = matrix(predictions, self.gallery.image_of_caption)
        found = recall.ranks(scores, owners)
        errors = recall.standard_errors(found, owners)
        values = recall.summarise(found) | {"images": float(len(scores)), "captions": float(len(owners))}
        return values | {f"{name}_standard_error": error for name, error in errors.items() if error is not None}


def matrix(predictions: list[Prediction], image_of_caption: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(image of each caption by row, scores fp32 [N, M]) of the images that were scored and have a caption."""
    with_caption = set(image_of_caption.tolist())
    scored = [one for one in predictions if one["position"] in with_caption]
    if not scored:
        raise ConfigError("no image of the split could be read and has a caption that can be; see the problems named")
    positions = np.array([one["position"] for one in scored])
    kept = np.flatnonzero(np.isin(image_of_caption, positions))
    scores = np.stack([one["_scores"] for one in scored])
    return np.searchsorted(positions, image_of_caption[kept]), scores[:, kept]
