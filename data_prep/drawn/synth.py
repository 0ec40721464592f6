"""Makes the synthetic corpora: captioned scenes, statements about image pairs, or loose images with a URL table."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.drawn.drawing import draw_jpeg
from data_prep.drawn.scenes import MAX_CAPTIONS, Scene, captions, draw_pair, draw_scene, scene_meta
from data_prep.manifest import Manifest
from data_prep.parallel import ordered_map
from data_prep.prepare import progress, provenance
from data_prep.record import PrepError, Record
from data_prep.shard_writer import SplitWriter, refuse_existing

# Held-out splits come first: what they hold does not depend on how much training data is asked for.
SPLITS = ("test", "dev", "train")
URL_COLUMNS = ("url", "caption", "main_colour", "main_shape", "questions", "scene")


@dataclass(frozen=True)
class SynthOptions:
    """``counts`` scenes per split; ``pair_share`` image pairs for each scene of the split."""

    counts: dict[str, int]
    seed: int = 0
    image_size: int = 64
    captions_per_image: int = 1
    pair_share: float = 0.25
    samples_per_shard: int = 2000
    workers: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.captions_per_image <= MAX_CAPTIONS:
            raise PrepError(f"--captions-per-image {self.captions_per_image}: expected 1 to {MAX_CAPTIONS}")
        if not 32 <= self.image_size <= 4096:
            raise PrepError(f"--image-size {self.image_size}: expected 32 to 4096 pixels")
        check_split_sizes(self.counts)
        if not 0 <= self.pair_share <= 1:
            raise PrepError(f"--pair-share {self.pair_share}: expected 0 to 1")

    @property
    def arguments(self) -> dict[str, Any]:
        """The options that determine the bytes."""
        return {
            "counts": self.counts,
            "seed": self.seed,
            "image_size": self.image_size,
            "captions_per_image": self.captions_per_image,
            "pair_share": self.pair_share,
        }


def check_split_sizes(counts: dict[str, int]) -> None:
    """Raises PrepError for sizes of splits that nothing can be made of."""
    if any(count < 0 for count in counts.values()) or not any(counts.values()):
        raise PrepError(f"split sizes {counts}: expected none negative and at least one above 0")


def write_corpora(output: Path, options: SynthOptions) -> list[Manifest]:
    """Write the corpus ``output`` and, beside it, ``output_pairs``; returns the manifests in the order of SPLITS."""
    pairs_output = output.with_name(output.name + "_pairs")
    outputs = [output, pairs_output] if options.pair_share else [output]
    for folder in outputs:
        for split, count in options.counts.items():
            if count:
                refuse_existing(folder / split, options.overwrite)
    manifests = []
    for split, scenes in distinct_scenes(options).items():
        render = partial(_scene_record, image_size=options.image_size, num_captions=options.captions_per_image)
        manifests.append(_write(output, split, 1, render, _keyed(split, scenes), options))
    if options.pair_share:
        for split, pairs in _distinct_pairs(options).items():
            render = partial(_pair_record, image_size=options.image_size)
            manifests.append(_write(pairs_output, split, 2, render, _keyed(split, pairs), options))
    return manifests


def _write(output: Path, split: str, num_images: int, render, items: list, options: SynthOptions) -> Manifest:
    writer = SplitWriter(
        output / split,
        output.name,
        split,
        num_images=num_images,
        samples_per_shard=options.samples_per_shard,
        overwrite=options.overwrite,
        provenance=provenance("data_prep synth", options.arguments, ("pillow", "numpy")),
    )
    with writer:
        records = ordered_map(render, items, options.workers if len(items) > 500 else 1)
        for record in progress(records, len(items), f"{output.name}/{split}"):
            writer.add(record)
    assert writer.manifest is not None
    return writer.manifest


def distinct_scenes(options: SynthOptions) -> dict[str, list[Scene]]:
    """Scenes of every split that is not empty; no scene comes twice, in one split or in two."""
    seen: set[bytes] = set()
    splits = {}
    for split in SPLITS:
        stream = _scene_stream(random.Random(f"scenes/{options.seed}/{split}"), seen)
        splits[split] = [next(stream) for _ in range(options.counts.get(split, 0))]
    return {split: scenes for split, scenes in splits.items() if scenes}


def _scene_stream(rng: random.Random, seen: set[bytes]) -> Iterator[Scene]:
    while True:
        scene = draw_scene(rng)
        if scene.identity() not in seen:
            seen.add(scene.identity())
            yield scene


def _distinct_pairs(options: SynthOptions) -> dict[str, list[tuple]]:
    seen: set[bytes] = set()
    splits: dict[str, list[tuple]] = {}
    for split in SPLITS:
        rng = random.Random(f"pairs/{options.seed}/{split}")
        wanted = round(options.counts.get(split, 0) * options.pair_share)
        pairs: list[tuple] = []
        while len(pairs) < wanted:
            pair = draw_pair(rng)
            identities = {pair[0].identity(), pair[1].identity()}
            if not identities & seen:
                seen |= identities
                pairs.append(pair)
        if pairs:
            splits[split] = pairs
    return splits


def _keyed(split: str, items: list) -> list[tuple[str, Any]]:
    return [(f"{split}_{number:07d}", item) for number, item in enumerate(items)]


def _scene_record(item: tuple[str, Scene], image_size: int, num_captions: int) -> Record:
    key, scene = item
    meta = scene_meta(scene, random.Random(f"questions/{scene.noise_seed}"))
    return Record(key, (draw_jpeg(scene, image_size),), tuple(captions(scene, num_captions)), meta, ("jpg",))


def _pair_record(item: tuple[str, tuple[Scene, Scene, str, bool]], image_size: int) -> Record:
    key, (left, right, statement, label) = item
    images = (draw_jpeg(left, image_size), draw_jpeg(right, image_size))
    return Record(key, images, (statement,), {"label": str(label)}, ("jpg", "jpg"))


def write_url_tables(folder: Path, base_url: str, options: SynthOptions) -> list[Path]:
    """Write ``folder/images/SPLIT/KEY.jpg`` and ``folder/SPLIT.tsv``, to be served over HTTP and fetched by ``urls``.

    ``questions`` and ``scene`` are JSON cells.
    """
    if options.captions_per_image != 1:
        raise PrepError("--urls writes one caption per image; leave --captions-per-image at 1")
    tables = []
    for split, scenes in distinct_scenes(options).items():
        images = folder / "images" / split
        images.mkdir(parents=True, exist_ok=True)
        table = folder / f"{split}.tsv"
        render = partial(_scene_record, image_size=options.image_size, num_captions=1)
        records = ordered_map(render, _keyed(split, scenes), options.workers if len(scenes) > 500 else 1)
        with open(table, "w", encoding="utf-8", newline="\n") as stream:
            stream.write("\t".join(URL_COLUMNS) + "\n")
            for record in progress(records, len(scenes), f"{folder.name}/{split}"):
                (images / f"{record.key}.jpg").write_bytes(record.images[0])
                cells = {**record.meta, "caption": record.captions[0]}
                cells["url"] = f"{base_url.rstrip('/')}/images/{split}/{record.key}.jpg"
                stream.write("\t".join(_cell(cells[column]) for column in URL_COLUMNS) + "\n")
        tables.append(table)
    return tables


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
