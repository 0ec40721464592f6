"""The verbs that prepare sets for tasks from annotation files and folders of images."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.annotations.annotated import AnnotatedSplit, records
from data_prep.annotations.easy_pairs import make_pairs
from data_prep.annotations.easy_vqa import read_easy_vqa
from data_prep.annotations.gqa import read_gqa
from data_prep.annotations.karpathy import held_out_images as held_out_by_karpathy
from data_prep.annotations.nlvr2 import read_nlvr2
from data_prep.annotations.okvqa import read_okvqa
from data_prep.annotations.published import compare
from data_prep.annotations.snli_ve import label_revision, read_snli_ve
from data_prep.annotations.visual_genome import coco_ids_of, read_visual_genome
from data_prep.annotations.vqav2 import held_out_images, read_vqav2, vocabulary_answers
from data_prep.filters import Limits
from data_prep.manifest import CAPTIONS, write_atomically
from data_prep.options.downloads import add_download
from data_prep.options.dry_run import add_dry_run, plan_images
from data_prep.options.shared import (
    Verb,
    add_filters,
    add_writing,
    limits_of,
    local_path,
    name_list,
    plain_name,
    positive_number,
    report_split,
    share,
    split_writer,
    whole_number,
)
from data_prep.passport import source_files
from data_prep.prepare import fill_split
from data_prep.record import MissingInput, PrepError, Rejection
from data_prep.shard_writer import refuse_existing
from data_prep.video.decoding import ClipLimits
from data_prep.vqa_answers import MIN_COUNT, build_vocabulary, vocabulary_file

VOCABULARY_NAME = "answers.json"


@dataclass
class Part:
    """A split to write: where to, what the annotation files say of it, where its images are, what its counts are of."""

    corpus: Path
    annotated: AnnotatedSplit
    images: list[Path]
    set_name: str
    published: str = ""  # the name of the split among the published counts, where it is another
    texts: str = CAPTIONS


def run_vqav2(args: argparse.Namespace) -> int:
    splits = read_vqav2(args.questions, args.annotations, args.split)
    parts = [Part(args.output, split, args.images, "vqav2", texts="questions") for split in splits]
    files = [*args.questions, *args.annotations]
    if args.vg_qa is not None:
        if args.vg_image_data is None:
            raise PrepError(
                "--vg-qa: give Visual Genome's image_data.json by --vg-image-data: it says which are of COCO"
            )
        held_out = {image.meta["image_id"] for split in splits if split.split != "train" for image in split.images}
        held_out = held_out.union(*map(coco_held_out, args.held_out))
        if not held_out:
            raise PrepError("--vg-qa: no held-out images of COCO are known; give --questions of val too, or --held-out")
        annotated = read_visual_genome(args.vg_qa, args.vg_image_data, held_out)
        parts.append(Part(args.vg_output, annotated, args.vg_images or args.images, "vg_qa", texts="questions"))
        files += [args.vg_qa, args.vg_image_data, *args.held_out]
    return prepare_parts(args, parts, files, vocabulary=(splits, args.answer_splits, args.min_answer_count))


def coco_held_out(path: Path) -> set[int]:
    """COCO ids of the held-out images in VQAv2's questions or Karpathy's file; raises PrepError."""
    try:
        return held_out_by_karpathy(path)
    except PrepError:
        return held_out_images(path)


def add_vqav2(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_vqa_form(parser, "v2_OpenEnded_mscoco_*_questions.json", "v2_mscoco_*_annotations.json; none for test")
    _add_vocabulary(parser, ["train", "dev"], MIN_COUNT)
    add("--vg-qa", type=local_path, help="Visual Genome's question_answers.json: a training corpus of its own beside")
    add("--vg-image-data", type=local_path, help="Visual Genome's image_data.json, which names its images of COCO")
    add("--vg-images", type=local_path, nargs="+", help="folders of Visual Genome's images; default: those of --images")
    add("--vg-output", type=local_path, default=Path("data/vg_qa"), help="corpus folder of Visual Genome's questions")
    add(
        "--held-out", type=local_path, nargs="+", default=[], help="further VQAv2 questions, or Karpathy's file of COCO"
    )
    add_options(parser, "data/vqav2", "COCO's images (train2014, val2014, test2015, or 2017's)")


def _add_vqa_form(parser: argparse.ArgumentParser, questions: str, annotations: str) -> None:
    add = parser.add_argument
    add("--questions", type=local_path, nargs="+", required=True, help=f"{questions}, several")
    add("--annotations", type=local_path, nargs="+", default=[], help=annotations)
    add("--split", type=plain_name, nargs="+", help="names of the splits in the order of --questions, for own ones")


def _add_vocabulary(parser: argparse.ArgumentParser, splits: list[str], min_count: int) -> None:
    add = parser.add_argument
    add("--answer-splits", type=name_list, default=splits, help="whose answers are counted; as A,B,...")
    add("--min-answer-count", type=positive_number, default=min_count, help="questions that an answer must have")


def run_okvqa(args: argparse.Namespace) -> int:
    splits = read_okvqa(args.questions, args.annotations, args.split)
    parts = [Part(args.output, split, args.images, "okvqa", texts="questions") for split in splits]
    vocabulary = (splits, args.answer_splits, args.min_answer_count)
    return prepare_parts(args, parts, [*args.questions, *args.annotations], vocabulary=vocabulary)


def add_okvqa(parser: argparse.ArgumentParser) -> None:
    _add_vqa_form(parser, "OpenEnded_mscoco_*_questions.json", "mscoco_*_annotations.json")
    _add_vocabulary(parser, ["train"], 3)  # of its 9,009 questions few have the same answer
    add_options(parser, "data/okvqa", "COCO's images (train2014, val2014)")


def run_gqa(args: argparse.Namespace) -> int:
    names = _split_names(args)
    coco_ids = None if args.vg_image_data is None else coco_ids_of(args.vg_image_data)
    splits = [read_gqa(path, name, coco_ids) for path, name in zip(args.input, names)]
    _refuse_twice(splits)
    parts = [Part(args.output, split, args.images, "gqa", texts="questions") for split in splits]
    files = [*args.input, *([] if args.vg_image_data is None else [args.vg_image_data])]
    return prepare_parts(args, parts, files, vocabulary=(splits, args.answer_splits, args.min_answer_count))


def add_gqa(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=local_path, nargs="+", required=True, help="{train,val,testdev,test}_balanced_questions.json")
    add("--split", type=plain_name, nargs="+", help="names of the splits in the order of --input, for own ones")
    add("--vg-image-data", type=local_path, help="Visual Genome's image_data.json, which names its images of COCO")
    _add_vocabulary(parser, ["train", "dev"], MIN_COUNT)
    add_options(parser, "data/gqa", "GQA's images (images), like 2370799.jpg")


def run_nlvr2(args: argparse.Namespace) -> int:
    annotated = read_nlvr2(args.input, args.split, args.balanced, args.unbalanced)
    files = [path for path in (args.input, args.balanced, args.unbalanced) if path is not None]
    return prepare_parts(args, [Part(args.output, annotated, args.images, "nlvr2")], files, num_images=2)


def add_nlvr2(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=local_path, required=True, help="train.json, dev.json or test1.json")
    parser.add_argument("--split", type=plain_name, help="its name; default: that of the identifiers, test for test1")
    parser.add_argument("--balanced", type=local_path, help="the published list of balanced statements of this split")
    parser.add_argument("--unbalanced", type=local_path, help="the published list of unbalanced statements")
    add_options(parser, "data/nlvr2", "images like dev-850-0-img0.png")


def run_snli_ve(args: argparse.Namespace) -> int:
    splits = [read_snli_ve(path, split) for path, split in zip(args.input, _split_names(args))]
    _refuse_twice(splits)
    revisions = {split.split: label_revision(split) for split in splits}
    parts = [Part(args.output, split, args.images, "snli_ve", texts="hypotheses") for split in splits]
    print("labels:", ", ".join(f"{split} {revision}" for split, revision in revisions.items()))
    return prepare_parts(args, parts, args.input, label_revision=revisions)


def _split_names(args: argparse.Namespace) -> list[str | None]:
    """The name that --split gives each --input, None where it gives none."""
    if args.split is not None and len(args.split) != len(args.input):
        raise PrepError(f"--split {' '.join(args.split)}: expected a name for each of the {len(args.input)} --input")
    return args.split or [None] * len(args.input)


def _refuse_twice(splits: Sequence[AnnotatedSplit]) -> None:
    if len({split.split for split in splits}) < len(splits):
        raise PrepError("--input: two files of the same split; give each once")


def add_snli_ve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=local_path, nargs="+", required=True, help="snli_ve_{train,dev,test}.jsonl")
    parser.add_argument("--split", choices=("train", "dev", "test"), nargs="+", help="where a file's name doesn't say")
    add_options(parser, "data/snli_ve", "Flickr30k's images (flickr30k_images)")


def run_easy_vqa(args: argparse.Namespace) -> int:
    splits, whole = read_easy_vqa(args.input, args.dev_share, args.seed)
    print(f"easy_vqa train and dev: {compare('easy_vqa', 'train and dev', whole)}")
    parts = [Part(args.output, split, args.images or [args.input], "easy_vqa", texts="questions") for split in splits]
    files = sorted(args.input.glob("*/questions.json"))
    return prepare_parts(args, parts, files, vocabulary=(splits, ["train"], args.min_answer_count))


def add_easy_vqa(parser: argparse.ArgumentParser) -> None:
    _add_easy(parser, "data/easy_vqa")
    parser.add_argument(
        "--min-answer-count", type=positive_number, default=MIN_COUNT, help="questions an answer must have"
    )


def run_easy_pairs(args: argparse.Namespace) -> int:
    splits, _ = read_easy_vqa(args.input, args.dev_share, args.seed)
    wanted = {"train": args.train, "dev": args.dev}
    pairs = [
        make_pairs(split, wanted[split.split], args.seed, args.statements_per_pair)
        for split in splits
        if wanted.get(split.split)
    ]
    parts = [Part(args.output, split, args.images or [args.input], "easy_pairs") for split in pairs]
    return prepare_parts(args, parts, [args.input / "train" / "questions.json"], num_images=2)


def add_easy_pairs(parser: argparse.ArgumentParser) -> None:
    _add_easy(parser, "data/easy_pairs")
    parser.add_argument("--train", type=whole_number, default=20000, help="statements for training")
    parser.add_argument("--dev", type=whole_number, default=2000, help="statements on held-out images")
    parser.add_argument(
        "--statements-per-pair", type=positive_number, default=1, help="on two images, at most; they share a sample"
    )


def _add_easy(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("--input", type=local_path, required=True, help="easy-VQA's data folder: train/, maybe test/")
    parser.add_argument("--dev-share", type=share, default=0.1, help="of the training images, for the dev split")
    parser.add_argument("--seed", type=int, default=0, help="which images are held out")
    add_options(parser, output, "a folder of train/images and test/images; default: --input")


def add_options(parser: argparse.ArgumentParser, output: str, images: str, downloads: bool = False) -> None:
    """The options of every set; with ``downloads`` those of downloading too."""
    parser.add_argument("--images", type=local_path, nargs="+", default=[], help=f"folders, zips or tars: {images}")
    parser.add_argument("--output", type=local_path, default=Path(output), help="corpus folder")
    parser.add_argument("--check", action="store_true", help="read the annotation files alone, print what they hold")
    add_dry_run(parser)
    if downloads:
        add_download(parser)
    else:
        add_filters(parser, duplicates=False)
        add_writing(parser)


def prepare_parts(
    args: argparse.Namespace,
    parts: Sequence[Part],
    files: Sequence[Path],
    num_images: int = 1,
    vocabulary: tuple[Sequence[AnnotatedSplit], list[str], int] | None = None,
    limits: Limits | ClipLimits | None = None,
    **arguments: Any,
) -> int:
    """Print the counts of the parts and, unless only to be checked, write them and the vocabulary of answers."""
    for part in parts:
        split = part.annotated
        print(f"{part.set_name} {split.split}: {compare(part.set_name, part.published or split.split, split.counts)}")
    answers = None if vocabulary is None else _vocabulary(args, *vocabulary)
    if args.check:
        for part in parts:
            examples, counted = _by_reason(part.annotated.problems)
            _name_problems(f"{part.set_name} {part.annotated.split}", examples, counted)
        return 0
    if args.dry_run:
        return plan_images(args, [(part.corpus / part.annotated.split, part.annotated, part.images) for part in parts])
    if any(not part.images for part in parts):
        kind = "videos" if parts[0].annotated.videos else "images"
        raise MissingInput(
            f"--{kind}: none given; name the folders of the {kind}, or --check the annotation files alone"
        )
    limits = limits or limits_of(args)
    for part in parts:
        refuse_existing(part.corpus / part.annotated.split, args.overwrite)
    arguments |= {"files": source_files(files), **limits.__dict__}
    for part in parts:
        _write(args, part, num_images, limits, {**arguments, "counts": part.annotated.counts})
    if answers is not None:
        write_atomically(args.output / VOCABULARY_NAME, answers)
        print(f"{args.output / VOCABULARY_NAME}: written")
    return 0


def _write(
    args: argparse.Namespace, part: Part, num_images: int, limits: Limits | ClipLimits, arguments: dict[str, Any]
) -> None:
    annotated = part.annotated
    packages = ("av",) if annotated.videos else ("pillow",)
    kind = (num_images, part.texts, annotated.videos)
    writer = split_writer(args, part.corpus, annotated.split, arguments, packages, *kind)
    source = records(annotated, part.images)
    total = len(annotated.problems) + len(annotated.images)
    manifest = fill_split(writer, source, limits, args.workers, total=total, label=annotated.split)
    report_split(part.corpus / annotated.split, manifest)
    _name_problems(str(part.corpus / annotated.split), writer.examples, writer.rejected)


def _vocabulary(
    args: argparse.Namespace, splits: Sequence[AnnotatedSplit], wanted: list[str], min_count: int
) -> str | None:
    """What answers.json will hold, from those of the ``wanted`` splits that are here; None without a training split.

    Raises PrepError where no answer is frequent enough, and where another vocabulary is there already.
    """
    by_name = {split.split: split for split in splits}
    names = [name for name in dict.fromkeys(wanted) if name in by_name]
    if "train" not in names:
        print(f"{VOCABULARY_NAME}: not made, as the training split is not among --answer-splits or not read here")
        return None
    vocabulary = build_vocabulary((a for name in names for a in vocabulary_answers(by_name[name])), min_count)
    described = f"{len(vocabulary):,} answers of at least {min_count} questions in {', '.join(names)}"
    print(f"{VOCABULARY_NAME}: {described}")
    if not vocabulary:
        raise PrepError(f"{described}; lower --min-answer-count")
    path = args.output / VOCABULARY_NAME
    content = json.dumps(vocabulary_file(vocabulary, names, min_count), indent=1) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != content and not (args.overwrite or args.check):
        raise PrepError(f"{path}: another vocabulary is there, which trained models depend on; give --overwrite")
    return content


def _by_reason(problems: Sequence[Rejection]) -> tuple[dict[str, Rejection], Counter[str]]:
    counts: Counter[str] = Counter()
    examples: dict[str, Rejection] = {}
    for problem in problems:
        examples.setdefault(problem.reason, problem)
        counts[problem.reason] += problem.rows
    return examples, counts


def _name_problems(where: str, examples: dict[str, Rejection], counts: dict[str, int]) -> None:
    """A line for each reason, that names the first row of it and says how many more there are."""
    for reason, first in examples.items():
        detail = f" ({first.detail})" if first.detail else ""
        more = counts[reason] - first.rows
        print(f"{where}: {reason}: {first.name}{detail}{f', and {more:,} more rows' if more > 0 else ''}")


ANNOTATION_VERBS: dict[str, Verb] = {
    "vqav2": ("prepare VQAv2 from its questions, annotations and COCO's images", add_vqav2, run_vqav2),
    "gqa": ("prepare GQA from its questions and images", add_gqa, run_gqa),
    "okvqa": ("prepare OK-VQA from its questions, annotations and COCO's images", add_okvqa, run_okvqa),
    "nlvr2": ("prepare a split of NLVR2 from its JSON lines and images", add_nlvr2, run_nlvr2),
    "snli_ve": ("prepare SNLI-VE from its JSON lines and Flickr30k's images", add_snli_ve, run_snli_ve),
    "easy_vqa": ("prepare easy-VQA, part of its training images held out", add_easy_vqa, run_easy_vqa),
    "easy_pairs": ("make statements about pairs of easy-VQA's images, in NLVR2's form", add_easy_pairs, run_easy_pairs),
}
