"""Writes what a frozen vision tower gives for each image beside the shards, for runs that read that instead of images.

    python -m pipeline.features --recipe R --data DIR [--splits train dev] [--batch-size N] [--section.key value ...]

Options are those of pipeline/train.py, which decide about tower, weights and pixels; --data.features says in which
dtype (float16). A training with the same options and --data.features reads what was written. Started by several ranks
(torchrun, srun, deepspeed) it shares the shards out; started again it goes on with those that are missing.

Exit codes: 0 done, 2 configuration, 75 told to stop.
"""

from __future__ import annotations

from pipeline.distributed.preempt import Stopped, StopRequest, end_at_once
from pipeline.host.keyboard import keep_launcher_from_keys
from pipeline.host.threads import wait_briefly

if __name__ == "__main__":
    end_at_once()  # what follows takes seconds to import
    keep_launcher_from_keys()
    wait_briefly()

import argparse  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

import torch  # noqa: E402

from data_prep.program import run_program  # noqa: E402
from pipeline.config.options import ConfigError, fail  # noqa: E402
from pipeline.config.program_options import whole_number  # noqa: E402
from pipeline.data.open_shards import DataError  # noqa: E402
from pipeline.distributed.devices import choose_device  # noqa: E402
from pipeline.distributed.endings import EXIT_REQUEUE, say  # noqa: E402
from pipeline.distributed.places import discover  # noqa: E402
from pipeline.recording.progress import Progress  # noqa: E402
from pipeline.stored_features.writing import open_tower, unwritten, write_shard  # noqa: E402
from pipeline.weights.packaged import parse_settings  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments, words = _parser().parse_known_args(argv)
    stop = StopRequest(ends="after this shard").listen(at_once=True)
    try:
        return _write(arguments, words, stop)
    except BrokenPipeError:
        raise
    except Stopped as error:
        return say(error, place=None)
    except (ValueError, OSError, DataError) as error:
        return fail(error if isinstance(error, ValueError) else ValueError(str(error)))
    finally:
        stop.close()


def _write(arguments: argparse.Namespace, words: list[str], stop: StopRequest) -> int:
    given = any(word.partition("=")[0] == "--data.features" for word in words)
    config = parse_settings(words + ([] if given else ["--data.features", "float16"])).config
    if config.data.features is None:
        raise ConfigError("--data.features null: expected float16 or bfloat16, the dtype that is written")
    place, device = choose_device(discover(os.environ))
    splits = arguments.splits or [split for split in (config.data.train_split, config.data.eval_split) if split]
    tower, source = open_tower(config, device)
    todo = unwritten(config, splits, source)
    mine = todo[place.rank :: place.world_size]
    progress = Progress(sum(one.samples for one in mine), unit="image", enabled=place.is_main)
    stop.poll_from_here()
    done = 0
    for shard in mine:
        if stop.requested:
            if place.is_main:
                print("stopped; the same command goes on", file=sys.stderr)
            return EXIT_REQUEUE
        write_shard(shard, config, tower, device, arguments.batch_size or _batch_size(device))
        done += shard.samples
        progress.update(done)
    progress.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="default: the training and the held-out split")
    sizes = "images at a time (default: 32 on a GPU, 4 on a CPU)"
    parser.add_argument("--batch-size", type=whole_number(1), metavar="IMAGES", help=sizes)
    return parser


def _batch_size(device: torch.device) -> int:
    """On a CPU so few that activations stay below what glibc maps anew, page by page, each time.

    EfficientNet-Lite0 at 224 px: the kernel took 2.3 times the tower's own seconds with 32 images, none with 4.
    """
    return 4 if device.type == "cpu" else 32


if __name__ == "__main__":
    run_program(main)
