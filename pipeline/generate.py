"""Captions images with the model of a run.

    python -m pipeline.generate --run RUN IMAGE...                           one caption per image, or video, file; of
                                                                             folders all that are in them
    python -m pipeline.generate --run RUN --data DIR --split dev --samples N   held-out samples, scored, for the report
    python -m pipeline.generate --run RUN --data DIR --split test --results FILE   all captions, in COCO's results form

Models that predict from left to right (flm, ar, prefixlm, and all that were fine-tuned on captioning) write word by
word; pretrained mlm models by Mask-Predict, which tries each of the ``--lengths``.

Exit codes: 0 done, 2 nothing to caption or a wrong command line, 75 told to stop.
"""

from __future__ import annotations

from pipeline.distributed.preempt import Stopped, StopRequest, end_at_once
from pipeline.host.threads import wait_briefly

if __name__ == "__main__":
    end_at_once()  # what follows takes seconds to import
    wait_briefly()

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from itertools import takewhile  # noqa: E402
from pathlib import Path  # noqa: E402

from data_prep.program import run_program  # noqa: E402
from model.decode.both_ways import ScoreWeights  # noqa: E402
from pipeline.checkpoint.files import run_of  # noqa: E402
from pipeline.config.program_options import number, whole_number  # noqa: E402
from pipeline.data.open_shards import DataError  # noqa: E402
from pipeline.data.shard_reader import open_corpora  # noqa: E402
from pipeline.distributed.endings import EXIT_REQUEUE, say  # noqa: E402
from pipeline.pictures.folders import CLIPS, PICTURES, files_of  # noqa: E402
from pipeline.reporting.formats import spoken  # noqa: E402
from pipeline.tasks.caption_scores import in_words  # noqa: E402
from pipeline.tasks.captioning import (  # noqa: E402
    SAMPLES_NAME,
    Captioner,
    Item,
    Nucleus,
    caption_items,
    items_of_corpora,
    items_of_files,
    load_captioner,
    write_results,
    write_samples,
)
from pipeline.using.trained import usable_device  # noqa: E402

DEFAULT_SAMPLES = 256


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if bool(arguments.images) == bool(arguments.data):
        print("error: give image files or --data DIR, one of the two", file=sys.stderr)
        return 2
    if arguments.results and not arguments.data:
        print(
            "error: --results is for --data DIR; of image files --json --output FILE writes the captions",
            file=sys.stderr,
        )
        return 2
    stop = StopRequest(ends="after the images that were read").listen(at_once=True)
    try:
        return _caption(arguments, stop)
    except BrokenPipeError:
        raise
    except Stopped as error:
        return say(error, place=None)
    except (ValueError, OSError, DataError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        stop.close()


def _caption(arguments: argparse.Namespace, stop: StopRequest) -> int:
    captioner = load_captioner(
        arguments.run,
        usable_device(arguments.device, "--device"),
        arguments.beams,
        arguments.max_tokens,
        arguments.prompt,
        arguments.lengths,
        _nucleus(arguments),
        _score_weights(arguments),
    )
    stop.poll_from_here()
    done = (_caption_split if arguments.data else _caption_files)(arguments, captioner, stop)
    if stop.requested:
        done = "what was printed is done" if arguments.images else "nothing is written"
        print(f"stopped: {done}; the same command begins anew", file=sys.stderr)
        return EXIT_REQUEUE
    if not done:
        print("error: no usable image", file=sys.stderr)
        return 2
    return 0


def _until_stopped(items: Iterator[Item], stop: StopRequest) -> Iterator[Item]:
    """No more items once told to stop: those that were read are captioned."""
    return takewhile(lambda _: not stop.requested, items)


def _nucleus(arguments: argparse.Namespace) -> Nucleus | None:
    """Options of nucleus sampling where it is asked for; raises ValueError for those that do not fit."""
    if not arguments.nucleus:
        if (arguments.temperature, arguments.seed) != (None, None):
            raise ValueError("--temperature and --seed are for --nucleus TOP_P")
        return None
    if arguments.beams:
        raise ValueError("--beams and --nucleus: two ways of searching; leave one out")
    return Nucleus(arguments.nucleus, arguments.temperature or 1.0, arguments.seed or 0)


def _score_weights(arguments: argparse.Namespace) -> ScoreWeights | None:
    """What decoding both ways weighs by, where it is asked for; raises ValueError for options that do not fit."""
    weights = arguments.score_weights
    if not arguments.both_ways:
        if weights is not None:
            raise ValueError("--score-weights is for --both-ways; give that too")
        return None
    if arguments.nucleus:
        raise ValueError("--both-ways and --nucleus: two ways of searching; leave one out")
    return ScoreWeights(*weights) if weights is not None else ScoreWeights()


def _caption_files(arguments: argparse.Namespace, captioner: Captioner, stop: StopRequest) -> int:
    files = files_of(arguments.images, PICTURES if captioner.pictures.num_frames is None else CLIPS)
    items = _until_stopped(items_of_files(files, captioner), stop)
    stream = open(arguments.output, "w", encoding="utf-8") if arguments.output else sys.stdout  # noqa: SIM115
    count = 0
    try:
        for item, caption in caption_items(captioner, items, arguments.batch_size):
            record = json.dumps({"file": item.name, "caption": caption}, ensure_ascii=False)
            print(record if arguments.json else f"{item.name}\t{caption}", file=stream, flush=True)
            count += 1
    finally:
        if stream is not sys.stdout:
            stream.close()
    return count


def _caption_split(arguments: argparse.Namespace, captioner: Captioner, stop: StopRequest) -> int:
    """How many samples were captioned; where it was told to stop, nothing is written of them."""
    corpora = open_corpora(arguments.data, arguments.split, videos=captioner.pictures.num_frames is not None)
    count = arguments.samples or (sum(map(len, corpora)) if arguments.results else DEFAULT_SAMPLES)
    items = _until_stopped(items_of_corpora(corpora, count, captioner), stop)
    captioned = list(caption_items(captioner, items, arguments.batch_size))
    if stop.requested or not captioned:
        return 0
    kind = "images" if captioner.pictures.num_frames is None else "clips"
    names = ", ".join(f"{corpus.name}/{corpus.manifest.split}" for corpus in corpora)
    protocol = f"{captioner.search}, {len(captioned)} {kind} of {names}, checkpoint {captioner.checkpoint.name}."
    path = arguments.output or run_of(captioner.checkpoint) / SAMPLES_NAME
    summary = write_samples(path, captioned, arguments.shown, protocol)
    if arguments.results:
        write_results(arguments.results, captioned)
    if arguments.json:
        print(json.dumps({"protocol": protocol, "scoring": summary.protocol, **summary.values}))
    else:
        print(" ".join(filter(None, [protocol, summary.protocol])))
        for name, value in summary.values.items():
            print(f"  {spoken(name)}: {in_words(name, value)}")
        print(path)
        if arguments.results:
            print(arguments.results)
    return len(captioned)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.generate", description="Caption images with the model of a run.", allow_abbrev=False
    )
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="images or videos to caption, or folders")
    parser.add_argument("--run", type=Path, required=True, help="run folder, or one of its checkpoint folders")
    parser.add_argument("--data", nargs="+", metavar="DIR", help="caption prepared samples instead of image files")
    parser.add_argument("--split", default="dev", help="split to take them from (default: dev)")
    parser.add_argument(
        "--samples",
        type=whole_number(),
        metavar="N",
        help=f"how many, over the whole split (default: {DEFAULT_SAMPLES}, with --results all)",
    )
    parser.add_argument("--shown", type=whole_number(), default=24, help="how many the report shows (default: 24)")
    results_help = "also write all captions there, as COCO's results files are: image_id and caption of each"
    parser.add_argument("--results", type=Path, metavar="FILE", help=results_help)
    beams_help = "beam search of this width; 1 is greedy (default, but for runs of captioning: as their options say)"
    parser.add_argument("--beams", type=whole_number(), help=beams_help)
    both_help = "of an FLM's beams take the one that its reverse stream finds probable too (default: of 3 beams)"
    parser.add_argument("--both-ways", action="store_true", help=both_help)
    weights_help = (
        "how much count the log probabilities by the forward stream, the reverse stream and the reconstructor"
    )
    weights_help += " in --both-ways (default: 1 1 0)"
    names = ("L2R", "R2L", "RECONSTRUCTION")
    parser.add_argument("--score-weights", type=number(zero=True), nargs=3, metavar=names, help=weights_help)
    nucleus_help = "sample each word from the most probable ones that hold TOP_P of the probability (1: from all)"
    parser.add_argument("--nucleus", type=number(most=1), metavar="TOP_P", help=nucleus_help)
    parser.add_argument(
        "--temperature", type=number(), help="divides the scores that --nucleus samples from (default: 1)"
    )
    parser.add_argument("--seed", type=int, help="decides what --nucleus draws (default: 0)")
    parser.add_argument("--max-tokens", type=whole_number(), help="longest caption in tokens (default: as in training)")
    parser.add_argument("--prompt", default="", help="words every caption starts with (needed for released behaviour)")
    lengths_help = "mlm: caption lengths in tokens to try (default: quantiles of the run's training captions)"
    parser.add_argument("--lengths", type=whole_number(), nargs="+", metavar="N", help=lengths_help)
    parser.add_argument("--batch-size", type=whole_number(), default=32, help="images at a time (default: 32)")
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--output", type=Path, help="file to write instead of stdout, or of RUN/samples.json")
    return parser


if __name__ == "__main__":
    run_program(main)
