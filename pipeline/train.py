"""Pretrains a model: ``deepspeed pipeline/train.py --deepspeed ds_configs/zero2.json`` or ``python pipeline/train.py``.

Exit codes: 0 done, 1 failure, 2 configuration or data that must be mended, 75 told to stop (saved, requeue me).
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: not pipeline/, whose names shadow others

import os  # noqa: E402
import traceback  # noqa: E402
from typing import Any  # noqa: E402

from data_prep.manifest import ManifestError, find_splits  # noqa: E402
from pipeline.config.command_line import Launch, describe, parse_command_line  # noqa: E402
from pipeline.config.options import ConfigError, fail, tokenizer_source, weighted_paths  # noqa: E402
from pipeline.distributed.host_memory import keep_freed_memory  # noqa: E402

EXIT_DONE, EXIT_FAILED = 0, 1


def main(argv: list[str] | None = None) -> int:
    """Refuse every mistake that can be seen without torch, then run."""
    try:
        launch = parse_command_line(sys.argv[1:] if argv is None else argv)
        check_prepared(launch)
    except ValueError as error:
        return fail(error, _is_main())
    return run(launch)


def check_prepared(launch: Launch) -> None:
    """Raise ConfigError naming the command to run first, when the training data is not there."""
    for path, _ in weighted_paths(launch.config.data):
        try:
            find_splits(path, launch.config.data.train_split, num_images=None)
        except ManifestError as error:
            if path.is_dir():
                raise
            raise ConfigError(
                f"{path}: no such folder; run `python -m data_prep synth && python -m data_prep tokenizer` first, "
                "or name prepared data by --data DIR"
            ) from error
    tokenizer_source(launch.config.data)


def run(launch: Launch, task: Any = None) -> int:
    """Connect the ranks, set up, train; never returns where a rank must leave by itself.

    ``task`` (a ``tasks.task.Task``) is the one that the configuration names, if not given.
    """

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no other
        keep_freed_memory()
    from pipeline.distributed.preempt import StopRequest
    from pipeline.distributed.ranks import Agreement, connect, discover, leave, lost_rank
    from pipeline.tasks.table import task_of
    from pipeline.training.loop import train
    from pipeline.training.session import Ranks, choose_device, resolve_ds_config, set_up

    try:
        place, device = choose_device(discover(os.environ))
        ds_config = resolve_ds_config(launch, place, device)
    except ValueError as error:
        return fail(error, _is_main())
    connect(place, device)
    agreement = Agreement()
    try:
        if place.is_main:
            print(describe(launch), flush=True)
        task = task or task_of(launch.config)
        session = set_up(launch, ds_config, task, Ranks(place, device, agreement, StopRequest().listen()))
    except ValueError as error:
        leave(fail(error, place.is_main))
    except BaseException:  # said, and the process ended: the other ranks would wait for this one for ever
        traceback.print_exc()
        leave(EXIT_FAILED)
    try:
        code = train(session)
    except BaseException as error:  # likewise
        known = session.batches.failure(error) or lost_rank(error)
        if known is None:
            traceback.print_exc()
        else:
            print(f"error: rank {place.rank}: {known}", file=sys.stderr)
        leave(EXIT_FAILED)
    leave(code, agreement)


def _is_main() -> bool:
    """Whether this process speaks for the job, before anything is known for sure."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
