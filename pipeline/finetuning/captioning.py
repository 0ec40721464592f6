"""The task of captioning: a caption word by word, scored by the field's metrics, each image once.

deepspeed pipeline/train.py --recipe coco_caption --data DIR --model.weights RUN
python -m pipeline.evaluate --run RUN --task captioning --split test --task.decoding beam --submission
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.manifest import write_atomically
from model.batch import Batch, Row
from model.build import build_captioning, build_objective
from model.config import Vocabulary
from model.decode.both_ways import both_ways, check_both_ways
from model.decode.likelihood import log_probabilities
from model.decode.search import nucleus
from model.decode.stream import decoder_of
from model.objectives.self_critical import Critic, SelfCriticalPlanner
from model.plans.builder import row_generator
from model.plans.captions import CaptionForm
from pipeline.config.options import Config, ConfigError, reads_by_language_model
from pipeline.data.order import sample_seed
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.tokenizer import TextTokenizer, clean_caption
from pipeline.data.transforms import UnusableSample
from pipeline.finetuning.caption_reward import CiderReward, texts_of
from pipeline.finetuning.ranking_rows import ImageRows
from pipeline.loading.datasets import ALL_TEXTS, OtherRows, Preparation
from pipeline.loading.open_data import eval_loader, placeholder_batch
from pipeline.metrics.captions import METRICS, CaptionScores, caption_scores, tokenization
from pipeline.metrics.submissions import caption_submission
from pipeline.tasks.language_rows import LanguageRows
from pipeline.tasks.pretraining import held_out_pass
from pipeline.tasks.searching import decoding, most_probable, weights_of
from pipeline.tasks.task import EvaluationPass, EvaluationRanks, Measurement, Prediction, Score

IN_TRAINING = ("bleu", "cider_d")  # which take seconds
LONGEST_REFERENCE = 512  # tokens
METRICS_NAME = "caption_metrics.json"


@dataclass(frozen=True)
class WrittenCaptions:
    """The row of a caption in a model's form, the prompt before its words; ``full_stop`` as of ``clean_caption``."""

    tokenizer: TextTokenizer
    form: CaptionForm
    max_text_length: int
    prompt: str = ""
    full_stop: bool = False

    def rows(self, sample: RawSample, seed: int, others: OtherRows) -> list[Row]:
        text = clean_caption(sample.text, self.full_stop)
        if not text:
            raise UnusableSample(sample.key, "empty caption")
        words = self.tokenizer.encode(f"{self.prompt} {text}" if self.prompt else text, self.max_text_length)[1:-1]
        return [Row(self.form.write(words, self.max_text_length), 0, seed, "pair", sample.key)]

    def placeholder(self, key: str) -> list[Row]:
        vocabulary = self.tokenizer.vocabulary
        return [Row([vocabulary.bos_id, vocabulary.eos_id], 0, 0, "placeholder", key)]


@dataclass(frozen=True)
class ReferenceRows(WrittenCaptions):
    """One row an image for self-critical training: its target are all its captions, as token ids that end in `</s>`."""

    def rows(self, sample: RawSample, seed: int, others: OtherRows) -> list[Row]:
        target = [self.tokenizer.encode(text, LONGEST_REFERENCE)[1:] for text in texts_of(sample)]
        if not target:
            raise UnusableSample(sample.key, "empty caption")
        row = self.placeholder(sample.key)[0]
        return [dataclasses.replace(row, seed=seed, role="pair", target=target)]


class CaptioningTask:
    """Captions of images, from any pretrained network."""

    num_images = 1

    def build(self, config: Config, vocabulary: Vocabulary) -> nn.Module:
        sizes = (config.model, config.objective, vocabulary, config.data.max_text_length)
        if not reads_by_language_model(config):
            options = config.task
            return build_captioning(*sizes, options.self_critical, options.r2l_weight, options.reconstruction_weight)
        for option, none in (("self_critical", "false"), ("r2l_weight", "0")):
            if getattr(config.task, option):
                raise ValueError(f"task.{option} is not for evlgen; use objective.name flm or --task.{option} {none}")
        return build_objective(*sizes)

    def preparation(self, config: Config, objective: nn.Module, tokenizer: TextTokenizer) -> Preparation:
        if not config.task.self_critical:
            return _reading(config, objective, tokenizer)
        prompt = prompt_words(config, tokenizer)
        objective.critic = Critic(CiderReward(config, tokenizer), prompt)
        maker = ReferenceRows(tokenizer, objective.form, config.data.max_text_length, config.task.prompt)
        return Preparation(maker, SelfCriticalPlanner(), config.model.vision.image_size)

    def scores(self, objective: nn.Module) -> tuple[Score, ...]:
        named = [Score("cider_d", True), Score("loss", False), *(Score(f"bleu_{n}", True) for n in (4, 3, 2, 1))]
        terms = ["caption", *getattr(objective, "directions", ())]
        each = [(Score(f"{term}_loss", False), Score(f"{term}_accuracy", True)) for term in terms]
        return *named, *(score for pair in each for score in pair)

    def passes(
        self,
        config: Config,
        objective: nn.Module,
        preparation: Preparation,
        held_out: Sequence[Corpus],
        ranks: EvaluationRanks,
    ) -> list[EvaluationPass]:
        """Captions of the images, each once, then the loss of all the captions that they have."""
        if config.task.min_tokens > longest(config):
            raise ConfigError(
                f"task.min_tokens {config.task.min_tokens} is more than the {longest(config)} tokens that a caption may"
                " have (data.max_text_length - 2); lower it"
            )
        if config.task.decoding == "both_ways":
            check_both_ways(objective, weights_of(config.task))
        corpora, tokenizer = list(held_out), preparation.maker.tokenizer
        images = dataclasses.replace(preparation, maker=ImageRows(), planner=images_only)
        batches = eval_loader(config, corpora, images, ranks.place, ranks.pin, texts_per_image=1)
        spare = placeholder_batch(images)
        writer = Writer(config, tokenizer, corpora, batches.dataset.rows(), ranks)
        reading = dataclasses.replace(_reading(config, objective, tokenizer), features=preparation.features)
        losses = eval_loader(config, corpora, reading, ranks.place, ranks.pin, texts_per_image=ALL_TEXTS)
        return [
            EvaluationPass(batches, spare, writer.measure, (), writer.summarise, write=writer.write),
            held_out_pass(losses, placeholder_batch(reading), {"caption": 1.0} | getattr(objective, "directions", {})),
        ]

    def protocol(self, config: Config) -> dict[str, Any]:
        """How the scores come about, for the scorecard."""
        frames = config.data.frames
        return ({} if frames is None else {"frames": f"{frames} of each clip, at equal distances"}) | {
            "decoding": decoding(config.task),
            "prompt": config.task.prompt,
            "max_tokens": longest(config),
            "min_tokens": config.task.min_tokens,
            "references": "all captions of an image, as they stand",
            "tokenization": tokenization(),
            "wrong_image": "cider_d_wrong_image: the same captions against the references of the image half the split"
            " away",
            "text_form": _text_form(config),
        }

    def submission(self, config: Config, predictions: Sequence[Prediction], items: Iterable[RawSample]) -> Any:
        """The COCO captions results file: a list of {"image_id", "caption"}."""
        expected = [item.meta.get("image_id", item.key) for item in items]
        return caption_submission([(one["image_id"], one["caption"]) for one in predictions], expected)


def _text_form(config: Config) -> str:
    if reads_by_language_model(config):
        return "that of the language model (model/language/text_form.py)"
    return "<s> <bos> words . <eos> </s>" if config.model.behaviour == "released" else "<s> words </s>"


def _reading(config: Config, objective: nn.Module, tokenizer: TextTokenizer) -> Preparation:
    """Captions of the data, to be predicted word by word."""
    num_prompt, size = len(prompt_words(config, tokenizer)), config.model.vision.image_size
    if reads_by_language_model(config):
        rows = LanguageRows(tokenizer, objective.form, config.data.max_text_length, config.task.prompt)
        return Preparation(rows, dataclasses.replace(objective.planner, num_prompt=num_prompt), size)
    maker = WrittenCaptions(
        tokenizer,
        objective.form,
        config.data.max_text_length,
        config.task.prompt,
        full_stop=config.model.behaviour == "released",
    )
    return Preparation(maker, objective.planner(num_prompt), size)


def prompt_words(config: Config, tokenizer: TextTokenizer) -> list[int]:
    """Token ids of ``task.prompt``; raises ConfigError where a tokenizer would join its end to the caption."""
    prompt, length = config.task.prompt, config.data.max_text_length
    if not prompt:
        return []
    words = tokenizer.encode(prompt, length)[1:-1]
    joined = tokenizer.encode(f"{prompt} a", length)[1:-1][: len(words)] != words
    if joined or prompt != clean_caption(prompt, full_stop=False) or len(words) > length - 3:
        raise ConfigError(
            f"task.prompt {prompt!r}: its tokens change when a caption follows, or leave it no room in"
            f" data.max_text_length {length}; use a few words with single blanks between them"
        )
    return words


def images_only(images: Tensor, rows: list[Row]) -> Batch:
    """A planner: images without text."""
    return Batch(images, {})


def longest(config: Config) -> int:
    """Tokens of a caption at most, prompt included: ``task.max_tokens``, as far as training went."""
    return min(config.task.max_tokens, config.data.max_text_length - 2)


@dataclass
class Writer:
    """Writes the captions of an evaluation and scores them; ``rows`` are (corpus, row) of the image at each position.

    What nucleus draws for an image depends on ``train.seed`` and the image's place in its corpus only.
    """

    config: Config
    tokenizer: TextTokenizer
    corpora: list[Corpus]
    rows: list[tuple[int, int]]
    ranks: EvaluationRanks
    found: CaptionScores | None = None  # on rank 0, once there are captions

    def measure(self, objective: nn.Module, batch: Batch) -> Measurement:
        """Captions of the batch's images, each encoded once; ranks that share one network take as many steps."""
        prompt = prompt_words(self.config, self.tokenizer)
        most = longest(self.config)
        tokens = objective.net.encode(batch.images)
        decoder = decoder_of(objective, batch.images, prompt, tokens)
        if self.config.task.decoding == "both_ways":
            found = self._both_ways(objective, decoder, tokens, most)
        else:
            found = self._search(decoder, most, batch)
        likelihood = log_probabilities(objective, tokens, found, most, len(prompt)).tolist()
        unusable = {key for key, _ in batch.problems}
        predictions = []
        for key, position, words, value in zip(batch.keys, batch.positions, found, likelihood):
            if key not in unusable:
                text = clean_caption(self.tokenizer.decode(words[len(prompt) :]), full_stop=False)
                of_image = self._about(position, key)
                about = {"position": position, "key": key, **of_image, "caption": text}
                predictions.append(about | {"log_probability": round(value, 4)})
        return Measurement({}, predictions)

    def _both_ways(self, objective: nn.Module, decoder: Any, tokens: Tensor, most: int) -> list[list[int]]:
        options = self.config.task
        search = (options.beams, options.length_penalty, weights_of(options), self.ranks.all_agree)
        return both_ways(objective, decoder, tokens, most, *search, options.min_tokens, options.repetition_penalty)

    def _search(self, decoder: Any, most: int, batch: Batch) -> list[list[int]]:
        options, agree = self.config.task, self.ranks.all_agree
        if options.decoding != "nucleus":
            return most_probable(options, decoder, most, agree, options.min_tokens)
        places = [self.rows[position] for position in batch.positions] or [(0, 0)] * len(batch.images)
        seeds = [sample_seed(self.config.train.seed, 0, *place) for place in places]
        uniforms = torch.from_numpy(np.stack([row_generator(seed).random(most) for seed in seeds]))
        uniforms, least = uniforms.to(batch.images.device), options.min_tokens
        return nucleus(decoder, most, uniforms, options.top_p, options.temperature, agree, least)

    def _about(self, position: int, key: str) -> dict[str, Any]:
        corpus, row = self.rows[position]
        sample = self.corpora[corpus].read_without_images(row)
        domain = sample.meta.get("domain")
        about = {"image_id": sample.meta.get("image_id", key), "references": texts_of(sample)}
        return about if domain is None else about | {"domain": domain}

    def summarise(self, totals: Mapping[str, float], predictions: list[Prediction]) -> dict[str, float]:
        """Scores of all captions, CIDEr-D of each domain that images name (nocaps), and CIDEr-D of the same captions
        against other images' references: what they owe to the language alone. Each prediction is told its "cider_d".
        """
        metrics = IN_TRAINING if self.ranks.in_training else METRICS
        known = [one for one in predictions if one["references"]]
        if not known:
            return {}
        found = self.found = self._scored(known, 0, metrics)
        for line in (*found.missing, *found.notes) if not self.ranks.in_training else ():
            print(f"note: {line}", file=sys.stderr, flush=True)
        values = {"captions": float(len(known)), **found.values}
        values |= {f"{n}_standard_error": error for n, error in found.standard_errors.items() if error is not None}
        for one in known:
            one["cider_d"] = round(found.per_item["cider_d"][one["position"]], 6)
        values |= _by_domain(known)
        if len(known) > 1:
            values["cider_d_wrong_image"] = self._scored(known, len(known) // 2, ("cider_d",)).values["cider_d"]
        return values

    def _scored(self, known: list[Prediction], shift: int, metrics: Sequence[str]) -> CaptionScores:
        """Scores of the captions against the references of the image ``shift`` places on."""
        captions = {one["position"]: one["caption"] for one in known}
        others = [*known[shift:], *known[:shift]]
        references = {one["position"]: other["references"] for one, other in zip(known, others, strict=True)}
        return caption_scores(captions, references, metrics)

    def write(self, folder: Path, predictions: list[Prediction]) -> None:
        """Tokenization, and what could not be computed or compared, beside the predictions."""
        if self.found is not None:
            counts = [len(one["references"]) for one in predictions if one["references"]]
            content = {name: getattr(self.found, name) for name in ("tokenization", "missing", "notes")}
            content["references"] = {"images": len(counts), "least": min(counts), "most": max(counts)}
            write_atomically(folder / METRICS_NAME, json.dumps(content, indent=1))


def _by_domain(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Mean CIDEr-D of the images of each domain, by the document frequencies of all images that are scored; so that of
    all images is the mean over domains, each counted by its images, as in the published tables of nocaps."""
    found: dict[str, list[float]] = {}
    for one in predictions:
        if "domain" in one:
            found.setdefault(str(one["domain"]), []).append(one["cider_d"])
    return {f"cider_d/{name}": sum(found[name]) / len(found[name]) for name in sorted(found)}
