"""Captions of images or clips by the model of a run: reading them, captioning them in batches, writing samples.json."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data_prep.manifest import write_atomically
from data_prep.video.decoding import is_video
from model.build import build_captioning, build_objective
from model.decode.both_ways import ScoreWeights, both_ways, check_both_ways
from model.decode.mask_predict import ITERATIONS, mask_predict
from model.decode.search import greedy, greedy_steps, nucleus
from model.decode.stream import decoder_of
from model.plans.builder import row_generator
from pipeline.config.options import Config, reads_by_language_model
from pipeline.config.task_options import CaptioningOptions
from pipeline.data.order import mix_words
from pipeline.data.shard_reader import Corpus, RawSample
from pipeline.data.tokenizer import TextTokenizer, clean_caption
from pipeline.data.transforms import UnusableSample
from pipeline.pictures.pictures import Pictures, pictures_of
from pipeline.tasks.caption_lengths import training_lengths
from pipeline.tasks.caption_scores import Summary, summarise
from pipeline.tasks.searching import BEAMS, weights_of
from pipeline.tasks.trained_run import TrainedRun, read_run
from pipeline.weights.starting import load_trained

SAMPLES_NAME = "samples.json"
THUMBNAIL_PIXELS = 192
MAX_FILE_BYTES = 256 * 2**20


class Item(NamedTuple):
    """An image or clip to caption: its name, pixels uint8 [I, 3, S, S], and what is known about it; I is 1, or the
    number of frames."""

    name: str
    pixels: Tensor
    references: list[str]
    meta: dict[str, Any]


class Nucleus(NamedTuple):
    """Options of nucleus sampling."""

    top_p: float = 0.9
    temperature: float = 1.0
    seed: int = 0


@dataclass
class Captioner:
    """A trained model ready to caption; ``lengths`` are tried by an mlm model, the other options are for the rest.

    Captions start with ``prompt``, of which they do not show the first ``num_hidden`` words. ``seed`` and the number of
    an image among those given decide what ``nucleus`` draws.
    """

    objective: nn.Module
    tokenizer: TextTokenizer
    pictures: Pictures
    device: torch.device
    checkpoint: Path
    beams: int = 1
    length_penalty: float = 1.0
    max_tokens: int = 30
    prompt: Sequence[int] = ()
    num_hidden: int = 0
    lengths: Sequence[int] = ()
    nucleus: Nucleus | None = None
    beam_rules: str = "beam"  # a search of BEAMS
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    score_weights: ScoreWeights | None = None  # by which both_ways chooses among the beams

    @torch.inference_mode()
    def caption(self, pixels: Sequence[Tensor], first: int = 0) -> list[str]:
        """One caption per image or clip, uint8 [I, 3, S, S] each; like the captions of training it is one line.
        ``first`` is the number of the first image among all that are captioned."""
        images = torch.stack(list(pixels)).to(self.device)
        if self.objective.name == "mlm":
            ids = mask_predict(self.objective, images, self.lengths)
        elif self.score_weights is not None:
            ids = self._both_ways(images, self.score_weights)
        else:
            ids = self._search(decoder_of(self.objective, images, self.prompt), len(images), first)
        return [self._text(row) for row in ids]

    @torch.inference_mode()
    def caption_steps(self, pixels: Tensor) -> Iterator[str]:
        """The caption of an image or clip, uint8 [I, 3, S, S], as greedy search has it after each token; of an mlm
        model, which writes all words at once, the whole alone."""
        if self.objective.name == "mlm":
            yield from self.caption([pixels])
            return
        decoder = decoder_of(self.objective, pixels[None].to(self.device), self.prompt)
        for ids in greedy_steps(decoder, self.max_tokens, self.min_tokens, self.repetition_penalty):
            yield self._text(ids[0])

    def _text(self, ids: list[int]) -> str:
        return clean_caption(self.tokenizer.decode(ids[self.num_hidden :]), full_stop=False)

    def _search(self, decoder: Any, count: int, first: int) -> list[list[int]]:
        if self.nucleus is not None:
            seeds = [mix_words(self.nucleus.seed, "caption", first + number) for number in range(count)]
            draws = torch.from_numpy(np.stack([row_generator(seed).random(self.max_tokens) for seed in seeds]))
            draws = draws.to(self.device)
            top_p, temperature, _ = self.nucleus
            return nucleus(decoder, self.max_tokens, draws, top_p, temperature, min_tokens=self.min_tokens)
        both = {"min_tokens": self.min_tokens, "repetition_penalty": self.repetition_penalty}
        if self.beams > 1:
            return BEAMS[self.beam_rules](decoder, self.max_tokens, self.beams, self.length_penalty, **both)
        return greedy(decoder, self.max_tokens, **both)

    def _both_ways(self, images: Tensor, weights: ScoreWeights) -> list[list[int]]:
        tokens = self.objective.net.encode(images)
        decoder = decoder_of(self.objective, images, self.prompt, tokens)
        both = {"min_tokens": self.min_tokens, "repetition_penalty": self.repetition_penalty}
        search = (self.max_tokens, self.beams, self.length_penalty, weights)
        return both_ways(self.objective, decoder, tokens, *search, **both)

    @property
    def search(self) -> str:
        """How captions are found, for people."""
        if self.objective.name == "mlm":
            return f"Mask-predict, {ITERATIONS} iterations, lengths {', '.join(map(str, self.lengths))}"
        if self.nucleus is not None:
            top_p, temperature, seed = self.nucleus
            return f"Nucleus sampling, top p {top_p:g}, temperature {temperature:g}, seed {seed}"
        if self.score_weights is not None:
            weights = ", ".join(f"{weight:g}" for weight in self.score_weights)
            return f"Both ways, {self.beams} beams, weights {weights} (l2r, r2l, reconstruction)"
        return f"Beam search of width {self.beams}" if self.beams > 1 else "Greedy search"


def load_captioner(
    run: Path,
    device: torch.device,
    beams: int | None = None,
    max_tokens: int | None = None,
    prompt: str = "",
    lengths: Sequence[int] | None = None,
    nucleus: Nucleus | None = None,
    score_weights: ScoreWeights | None = None,
) -> Captioner:
    """The model of a run folder, or of one of its checkpoint folders; captions start with ``prompt``.

    A run of task captioning also reads its own ``task.prompt``, which captions do not show, and searches as its options
    say where none of ``beams``, ``nucleus`` and ``score_weights`` is given; any other run searches greedily then. With
    ``score_weights`` an FLM chooses both ways among its ``beams``, 3 if that is None.

    ``lengths``, in tokens, are for mlm models, which have no beams and no prompt; None takes quantiles of the run's
    training captions.

    Raises:
        ValueError: the run, its checkpoint or its tokenizer is missing or damaged, an option does not fit the
            objective, or there are no lengths and no training data; one line that says which.
    """
    found = read_run(run)
    objective = _built(found.config, found.tokenizer)
    captioner = captioner_of(found, objective, device, beams, max_tokens, prompt, lengths, nucleus, score_weights)
    load_trained(objective, found.config.model, found.checkpoint)
    objective.eval().to(device)
    return captioner


def captioner_of(
    run: TrainedRun,
    objective: nn.Module,
    device: torch.device,
    beams: int | None = None,
    max_tokens: int | None = None,
    prompt: str = "",
    lengths: Sequence[int] | None = None,
    nucleus: Nucleus | None = None,
    score_weights: ScoreWeights | None = None,
) -> Captioner:
    """A captioner of a run's ``objective``, in evaluation mode on ``device`` when it captions; else as
    :func:`load_captioner`."""
    config, tokenizer = run.config, run.tokenizer
    longest = config.data.max_text_length
    most = min(max_tokens or longest - 2, longest - 2)  # words without <s> and </s>
    if objective.name == "mlm":
        if (beams or 1) > 1 or prompt or nucleus or score_weights:
            raise ValueError(
                f"{run.folder} is an mlm model: no --beams, no --nucleus and no --prompt, nor --both-ways; --lengths is"
                " what it can be told"
            )
        lengths = _mlm_lengths(lengths, config, tokenizer, objective.planner.full_stop, most)
    elif lengths is not None:
        raise ValueError(f"--lengths is for mlm models, {run.folder} is one of {objective.name}; use --max-tokens")
    own, options = "", config.task
    penalty, repetition, rules, least = 1.0, 1.0, "beam", 0
    if isinstance(options, CaptioningOptions):
        own, least = options.prompt, min(options.min_tokens, most)
        if (beams, nucleus, score_weights) == (None, None, None):
            has_beams = options.decoding in BEAMS or options.decoding == "both_ways"
            beams, penalty = options.beams if has_beams else 1, options.length_penalty
            rules = options.decoding if options.decoding in BEAMS else rules
            repetition = options.repetition_penalty
            if options.decoding == "nucleus":
                nucleus = Nucleus(options.top_p, options.temperature, config.train.seed)
            if options.decoding == "both_ways":
                score_weights = weights_of(options)
    if score_weights is not None:
        check_both_ways(objective, score_weights)
        beams = beams or CaptioningOptions.beams
    words = " ".join(part for part in (own, prompt) if part)
    return Captioner(
        objective=objective,
        tokenizer=tokenizer,
        pictures=pictures_of(config, exact=True),
        device=device,
        checkpoint=run.checkpoint,
        beams=beams or 1,
        length_penalty=penalty,
        max_tokens=most,
        prompt=tokenizer.encode(words, longest)[1:-1] if words else (),
        num_hidden=len(tokenizer.encode(own, longest)) - 2 if own else 0,
        lengths=lengths or (),
        nucleus=nucleus,
        beam_rules=rules,
        min_tokens=least,
        repetition_penalty=repetition,
        score_weights=score_weights,
    )


def _built(config: Config, tokenizer: TextTokenizer) -> nn.Module:
    """The objective of a run; raises ValueError for a task that writes no captions."""
    sizes = (config.model, config.objective, tokenizer.vocabulary, config.data.max_text_length)
    if config.task.name == "captioning" and not reads_by_language_model(config):
        options = config.task
        return build_captioning(*sizes, options.self_critical, options.r2l_weight, options.reconstruction_weight)
    if config.task.name not in ("captioning", "pretraining"):
        raise ValueError(f"a run of task {config.task.name} writes no captions; use one of captioning or pretraining")
    if config.objective.name == "qformer_stage1":
        raise ValueError("a run of objective qformer_stage1 writes no captions; use one of evlgen that starts from it")
    return build_objective(*sizes)


def _mlm_lengths(
    lengths: Sequence[int] | None, config: Config, tokenizer: TextTokenizer, full_stop: bool, most: int
) -> list[int]:
    """The lengths given, each once, or those of the training captions, cut to ``most``."""
    if lengths is None:
        try:
            return sorted({min(length, most) for length in training_lengths(config, tokenizer, full_stop)})
        except (ValueError, OSError) as error:
            raise ValueError(
                f"an mlm model must be told how long captions are: {error}; give --lengths, such as --lengths 8 10 12"
            ) from None
    if not lengths or not 1 <= min(lengths) <= max(lengths) <= most:
        raise ValueError(f"--lengths {' '.join(map(str, lengths))}: expected numbers of tokens from 1 to {most}")
    return sorted(set(lengths))


def caption_items(captioner: Captioner, items: Iterator[Item], batch_size: int) -> Iterator[tuple[Item, str]]:
    """Captions a stream of images in batches, in order."""
    batch: list[Item] = []
    first = 0
    for item in items:
        batch.append(item)
        if len(batch) == batch_size:
            yield from zip(batch, captioner.caption([one.pixels for one in batch], first), strict=True)
            first, batch = first + len(batch), []
    if batch:
        yield from zip(batch, captioner.caption([one.pixels for one in batch], first), strict=True)


def items_of_files(paths: Iterable[Path], captioner: Captioner) -> Iterator[Item]:
    """The readable images among ``paths``, or clips where the run is one of clips; each of the others is one line on
    stderr.

    The name of a file is bytes; where they are no UTF-8 an item has escapes in its name.
    """
    for path in paths:
        name = os.fsencode(path).decode("utf-8", "backslashreplace")
        try:
            pixels = pixels_of_bytes(read_bounded(path, name), name, captioner.pictures)
        except IsADirectoryError:
            print(f"skipped {name}: a folder; name the image files in it, like {name}/*.jpg", file=sys.stderr)
            continue
        except OSError as error:
            print(f"skipped {name}: {error.strerror or error}", file=sys.stderr)
            continue
        except UnusableSample as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        yield Item(name, pixels, [], {})


def read_bounded(path: Path, name: str) -> bytes:
    """The bytes of a file; raises OSError, and UnusableSample for too many of them."""
    with open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise UnusableSample(name, f"file larger than {MAX_FILE_BYTES // 2**20} MiB")
    return data


def pixels_of_bytes(data: bytes, name: str, pictures: Pictures) -> Tensor:
    """uint8 [I, 3, S, S]; raises UnusableSample, also for a clip where images are wanted and the other way round."""
    clip = is_video(data)
    if clip and pictures.num_frames is None:
        raise UnusableSample(name, "a video, this run captions images; use a run with data.frames")
    if not clip and pictures.num_frames is not None:
        raise UnusableSample(name, "not a video (MP4, QuickTime, WebM, Matroska, AVI), this run captions clips")
    return pictures.of(RawSample(name, [] if clip else [data], "", {}, video=data if clip else None))


def items_of_corpora(corpora: Sequence[Corpus], num_samples: int, captioner: Captioner) -> Iterator[Item]:
    """Up to ``num_samples`` images or clips spread evenly over the corpora, each once; unusable ones on stderr."""
    total = sum(len(corpus) for corpus in corpora)
    seen: set[tuple[int, str]] = set()
    for number in range(min(num_samples, total)):
        index, which = number * total // min(num_samples, total), 0
        while index >= len(corpora[which]):
            index -= len(corpora[which])
            which += 1
        try:
            sample = corpora[which].read(index)
            if (which, sample.key) in seen:
                continue
            seen.add((which, sample.key))
            pixels = captioner.pictures.of(sample)
        except UnusableSample as error:
            print(f"skipped {error}", file=sys.stderr)
            continue
        references = sample.meta.get("captions") or [sample.text]
        yield Item(sample.key, pixels, list(references), sample.meta)


def thumbnail(pixels: Tensor) -> str:
    """uint8 [3, H, W] as a small JPEG, base64."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def write_samples(path: Path, captioned: list[tuple[Item, str]], shown: int, protocol: str) -> Summary:
    """Writes samples.json, read by the report: ``shown`` samples, the summary of all; returns that summary."""
    summary = summarise([(caption, item.references, item.meta) for item, caption in captioned])
    samples = [
        {
            "key": item.name,
            "references": item.references,
            "caption": caption,
            "cider_d": score,
            "thumbnail": thumbnail(item.pixels[len(item.pixels) // 2]),
            "meta": {name: item.meta[name] for name in ("main_colour", "main_shape") if name in item.meta},
        }
        for (item, caption), score in zip(captioned[:shown], summary.per_caption[:shown], strict=True)
    ]
    protocol = " ".join(filter(None, [protocol, summary.protocol and f"{summary.protocol}."]))
    write_atomically(path, json.dumps({"protocol": protocol, "summary": summary.values, "samples": samples}))
    return summary


def write_results(path: Path, captioned: Sequence[tuple[Item, str]]) -> int:
    """Writes all captions in the form of COCO's results files, in the order of the samples; returns how many.

    An image is named by its ``image_id`` where the corpus has one, else by its key. Raises ValueError for an image
    that is there twice, as evaluators would take one caption of the two.
    """
    entries = [{"image_id": item.meta.get("image_id", item.name), "caption": caption} for item, caption in captioned]
    number, count = Counter(entry["image_id"] for entry in entries).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"image_id {number!r} is captioned {count} times, expected each image once; caption one corpus at a time"
        )
    write_atomically(path, json.dumps(entries, ensure_ascii=False))
    return len(entries)
