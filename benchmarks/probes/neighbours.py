"""Captions without a language model, to compare with: those of a random or the nearest training images, and people's.

    python -m benchmarks.probes.neighbours --run RUN --output FILE [--caption-images N]

Images are as near as the mean tokens of the run's frozen vision tower, each channel standardised, by their cosine. The
consensus of an image is the caption of its 15 nearest training images that resembles all others of theirs most, by
CIDEr-D (Devlin et al., "Exploring nearest neighbor approaches for image captioning", 2015, section 3). A person is each
held-out caption against the other captions of its image. Exit codes: 0 done, 2 the run or its data cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from data_prep.manifest import write_atomically
from pipeline.config.command_line import load_config
from pipeline.config.options import fail, weighted_paths
from pipeline.data.shard_reader import Corpus, open_corpora
from pipeline.loading.open_data import open_held_out
from pipeline.metrics.cider import CiderD, DocumentFrequencies, cider_d, plain_words
from pipeline.tasks.captioning import Captioner, Item, items_of_corpora, load_captioner

NEIGHBOURS = 15
IMAGES_AT_A_TIME = 32
SEED = 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes.neighbours", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder with a frozen vision tower")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--caption-images", type=int, default=300, help="held-out images (default: 300)")
    arguments = parser.parse_args(argv)
    try:
        found = scores_of_run(arguments.run, arguments.caption_images)
    except ValueError as error:
        return fail(error)
    write_atomically(arguments.output, json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))
    return 0


def scores_of_run(run: Path, caption_images: int) -> dict[str, float]:
    """CIDEr-D of each way on a run's held-out images; raises ValueError where its tower learns or data is missing."""
    config = load_config(run)
    if not config.model.vision.frozen:
        raise ValueError(f"{run}: its vision tower is trained; neighbours are for one that stays (model.vision.frozen)")
    captioner = load_captioner(run, torch.device("cpu"))
    train = open_corpora([path for path, _ in weighted_paths(config.data)], config.data.train_split)
    held_out = open_held_out(config)
    if not held_out:
        raise ValueError(f"no split {config.data.eval_split!r} in {', '.join(config.data.paths)}")
    everything = sum(corpus.manifest.samples for corpus in train)
    known, captions = _images(captioner, train, everything)
    asked, references = _images(captioner, held_out, caption_images)
    return scores(known, captions, asked, references)


def scores(
    known: Tensor, captions: Sequence[Sequence[str]], asked: Tensor, references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """``known`` fp32 [N, W] are features of training images, ``asked`` [M, W] of held-out ones; CIDEr-D of each way."""
    mean, deviation = known.mean(0), known.std(0).clamp_min(1e-6)
    standard = [nn.functional.normalize((part - mean) / deviation, dim=1) for part in (known, asked)]
    nearest = (standard[1] @ standard[0].T).topk(min(NEIGHBOURS, len(known)), dim=1).indices.tolist()
    generator = torch.Generator().manual_seed(SEED)
    random = torch.randint(len(known), (len(asked),), generator=generator).tolist()
    frequencies = DocumentFrequencies.of([[plain_words(text) for text in of] for of in captions])
    return {
        "random_caption": cider_d([captions[image][0] for image in random], references),
        "nearest_caption": cider_d([captions[images[0]][0] for images in nearest], references),
        "consensus": cider_d([consensus([captions[i] for i in images], frequencies) for images in nearest], references),
        "person": _people(references),
    }


def consensus(captions: Sequence[Sequence[str]], frequencies: DocumentFrequencies) -> str:
    """Of the captions of some images the one with the highest mean CIDEr-D against all others; ties: the first."""
    texts = [text for of_image in captions for text in of_image]
    scorer = CiderD(frequencies)
    vectors = [scorer.vector(plain_words(text)) for text in texts]
    means = [
        scorer.score(vector, [other for place, other in enumerate(vectors) if place != number])
        for number, vector in enumerate(vectors)
    ]
    return texts[means.index(max(means))]


def _people(references: Sequence[Sequence[str]]) -> float:
    """Mean over the captions of an image, each against the other ones of it."""
    least = min(map(len, references))
    if least < 2:
        raise ValueError("an image has a single caption; a person's score needs two")
    one_out = [
        cider_d([of[n] for of in references], [[t for m, t in enumerate(of) if m != n] for of in references])
        for n in range(least)
    ]
    return sum(one_out) / least


def _images(captioner: Captioner, corpora: Sequence[Corpus], count: int) -> tuple[Tensor, list[list[str]]]:
    """Mean tokens fp32 [N, W] of images spread evenly over the corpora, and their captions."""
    features, captions = [], []
    for items in _batches(items_of_corpora(corpora, count, captioner)):
        with torch.inference_mode():
            tokens = captioner.objective.net.vision(torch.stack([item.pixels[0] for item in items]))
        features.append(tokens.float().mean(1))
        captions += [item.references for item in items]
    return torch.cat(features), captions


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == IMAGES_AT_A_TIME:
            yield batch
            batch = []
    if batch:
        yield batch


if __name__ == "__main__":
    sys.exit(main())
