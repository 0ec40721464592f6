"""Measures what the checkpoints of a run have learnt, by probes that are fair to every objective.

    python -m benchmarks.probes --run RUN [--train-images N] [--test-images N] [--caption-images N]

Appends a line per checkpoint to RUN/probes.jsonl, and one for the untrained model (step 0); what stands there is not
measured again. Exit codes: 0 done, 2 the run or its data cannot be used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.probes.data import ProbeData, Reader, Split, choose, encoded
from benchmarks.probes.logistic import Reading, read
from model.batch import Row
from model.build import build_objective
from pipeline.checkpoint.files import published, step_of
from pipeline.checkpoint.restore import load_into, resolve
from pipeline.config.command_line import load_config
from pipeline.config.options import Config, fail, weighted_paths
from pipeline.data.shard_reader import Corpus, open_corpora
from pipeline.data.tokenizer import clean_caption
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.loading.open_data import open_held_out
from pipeline.metrics.cider import cider_d
from pipeline.recording.step_lines import StepLines
from pipeline.recording.step_lines import step_of as step_of_line
from pipeline.tasks.caption_scores import exact_share, is_drawn, summarise
from pipeline.tasks.captioning import Captioner, caption_items, load_captioner
from pipeline.weights.starting import load_starting_weights

NAME = "probes.jsonl"
IMAGES_AT_A_TIME = 32
IMAGES = (  # option, default, what the images are for
    ("train", 600, "of the training split, whose questions and captions fit the probes"),
    ("test", 400, "of the held-out split, on which they are tested"),
    ("caption", 300, "of the held-out split to caption"),
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe_run(arguments.run, arguments.train_images, arguments.test_images, arguments.caption_images, device)
    except ValueError as error:
        return fail(error)
    return 0


def probe_run(run: Path, train_images: int, test_images: int, caption_images: int, device: torch.device) -> None:
    """Measure every checkpoint of a run, and its untrained model, that RUN/probes.jsonl does not hold yet.

    Raises:
        ValueError: there is no checkpoint, no held-out split, or the data cannot be read.
    """
    done = {record["step"] for record in read_probes(run)}
    due = [path for path in published(run) if step_of(path) not in done]
    if not due:
        return
    config = load_config(run)
    captioner = load_captioner(due[-1], device)
    data = choose(*_open(config), captioner, train_images, test_images, caption_images)
    if config.model.vision.frozen:
        data = encoded(data, captioner)
    lines = StepLines(run / NAME)
    if 0 not in done:
        untrained = dataclasses.replace(captioner, objective=_untrained(run, config, captioner).eval().to(device))
        lines.write({"step": 0, **measure(untrained, data)})
    for path in due:
        load_into(captioner.objective, resolve(path))
        values = measure(captioner, data)
        lines.write({"step": step_of(path), **values})
        shown = {name: round(value, 4) for name, value in values.items() if isinstance(value, float)}
        print(f"{path.name}: {json.dumps(shown)}", flush=True)
    lines.close()


def read_probes(run: Path) -> list[dict[str, Any]]:
    """The measured lines of a run by step."""
    path = run / NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = {step_of_line(line): line for line in lines if step_of_line(line) is not None}
    return [json.loads(records[step]) for step in sorted(records)]


def measure(captioner: Captioner, data: ProbeData) -> dict[str, Any]:
    """Every probe that the data has questions or references for; ``skipped`` names the others with the reason.

    ``vqa_accuracy``, in all and by type, and ``vqa_blind`` of an answerer without eyes; ``matching_accuracy`` (chance
    is 0.5);
    ``caption_exact_match``, ``caption_main_object``, ``caption_cider_d``, and ``caption_blind_cider_d`` of the same
    captions against the references of other images.
    """
    began = time.perf_counter()
    values: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    if captioner.objective.name == "evlgen":
        skipped |= dict.fromkeys(("matching", "vqa"), "the states of a frozen language model are not learnt")
    else:
        features = [features_of(captioner, split) for split in (data.train, data.test)]
        values |= _match(data, *(pairs for pairs, _ in features))
        if data.train.questions and data.test.questions:
            values |= _answer(data, *(questions for _, questions in features))
        else:
            skipped["vqa"] = "the samples' metadata holds no questions"
    try:
        values |= _caption(captioner, data)
    except ValueError as error:  # released behaviour needs a prompt
        skipped["caption"] = str(error)
    values["seconds"] = round(time.perf_counter() - began, 2)
    return values | ({"skipped": skipped} if skipped else {})


@torch.inference_mode()
def features_of(captioner: Captioner, split: Split) -> tuple[Tensor, Tensor]:
    """Frozen features of a split's pairs and of its questions, fp32 [pairs, 2D] and [questions, 2D] on the host.

    Each image is encoded once, all that is asked about it reads the same tokens.
    """
    readers = [*split.pairs, *split.questions]
    by_image: dict[int, list[int]] = defaultdict(list)
    for number, reader in enumerate(readers):
        by_image[reader.image].append(number)
    found: list[Tensor | None] = [None] * len(readers)
    for first in range(0, len(split.items), IMAGES_AT_A_TIME):
        part = range(first, min(first + IMAGES_AT_A_TIME, len(split.items)))
        numbers = [number for image in part for number in by_image[image]]
        rows = [_row(captioner, readers[number], first) for number in numbers]
        images = torch.stack([split.items[image].pixels for image in part])
        batch = captioner.objective.planner(images, rows)
        features = captioner.objective.features(batch.to(captioner.device)).cpu()
        for number, feature in zip(numbers, features, strict=True):
            found[number] = feature
    together = torch.stack(found)
    return together[: len(split.pairs)], together[len(split.pairs) :]


def _row(captioner: Captioner, reader: Reader, first_image: int) -> Row:
    length = captioner.objective.net.embedding.position.num_embeddings - 2
    ids = captioner.tokenizer.encode(clean_caption(reader.text, False), length)
    return Row(ids, reader.image - first_image, seed=0, role="read")


def _answer(data: ProbeData, train: Tensor, test: Tensor) -> dict[str, Any]:
    """VQA as classification among all training answers; share of right answers, in all and by type of question."""
    reading = _read(train, data.train.questions, test, data.test.questions, len(data.answers))
    values = {"vqa_accuracy": reading.accuracy, "vqa_blind": data.blind_accuracy, "vqa_penalty": reading.penalty}
    for kind in sorted(set(data.test.types)):
        of_kind = torch.tensor([one == kind for one in data.test.types])
        values[f"vqa_accuracy/{kind}"] = reading.correct[of_kind].double().mean().item()
    return values


def _match(data: ProbeData, train: Tensor, test: Tensor) -> dict[str, Any]:
    """Whether a caption is the image's own; as many are as are not."""
    reading = _read(train, data.train.pairs, test, data.test.pairs, num_classes=2)
    return {"matching_accuracy": reading.accuracy, "matching_penalty": reading.penalty}


def _read(train: Tensor, asked: list[Reader], test: Tensor, asked_test: list[Reader], num_classes: int) -> Reading:
    labels, groups = (torch.tensor([getattr(one, name) for one in asked]) for name in ("label", "image"))
    return read(train, labels, groups, test, torch.tensor([one.label for one in asked_test]), num_classes)


def _caption(captioner: Captioner, data: ProbeData) -> dict[str, Any]:
    """Captions by the model's own way of decoding, against the references of the image."""
    captioned = list(caption_items(captioner, iter(data.captioned), IMAGES_AT_A_TIME))
    scored = [(caption, item.references, item.meta) for item, caption in captioned]
    summary = summarise([one for one in scored if is_drawn(one[2])]).values
    values = {"caption_exact_match": exact_share(scored)}
    if "main_colour_and_shape_share" in summary:
        values["caption_main_object"] = summary["main_colour_and_shape_share"]
    if max(len(item.references) for item, _ in captioned) > 1:
        texts, references = [text for _, text in captioned], [item.references for item, _ in captioned]
        half = len(captioned) // 2
        values["caption_cider_d"] = cider_d(texts, references)
        values["caption_blind_cider_d"] = cider_d(texts, references[half:] + references[:half])
    return values


def _open(config: Config) -> tuple[list[Corpus], list[Corpus]]:
    """Training and held-out corpora of a run."""
    held_out = open_held_out(config)
    if not held_out:
        raise ValueError(
            f"no split {config.data.eval_split!r} in {', '.join(config.data.paths)}: probes are tested on held-out "
            "images; prepare that split, or name another by data.eval_split in the recipe"
        )
    return open_corpora([path for path, _ in weighted_paths(config.data)], config.data.train_split), held_out


def _untrained(run: Path, config: Config, captioner: Captioner) -> torch.nn.Module:
    """The model as the run's first step found it; raises ValueError where its starting weights are not to be had."""
    torch.manual_seed(config.train.seed)
    length, tokenizer = config.data.max_text_length, captioner.tokenizer
    built = build_objective(config.model, config.objective, tokenizer.vocabulary, length)
    found = load_starting_weights(built, config.model, tokenizer, Place(0, 1, 0, "single"), Agreement())
    noted = starting_weights(run)
    if noted and noted != {name: start["taken"] for name, start in found.items()}:
        raise ValueError(f"{run} started from {noted}, now found {found}; make the same weights available again")
    return built


def starting_weights(run: Path) -> dict[str, str | None]:
    """What a run noted that it started from, by part of the model; None is random."""
    noted = json.loads((run / "environment.json").read_text(encoding="utf-8")).get("starting_weights") or {}
    return {name: start["taken"] for name, start in noted.items()}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder of pipeline/train.py")
    for name, default, what in IMAGES:
        parser.add_argument(f"--{name}-images", type=int, default=default, help=f"images {what} (default: {default})")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
