"""Pretrains a model: ``deepspeed pipeline/train.py --deepspeed ds_configs/zero2.json`` or ``python pipeline/train.py``.

Exit codes: 0 done, 1 a bug, 2 settings, data or a disk that must be mended, 75 told to stop or the machine failed:
requeue me.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: not pipeline/, whose names shadow others

from pipeline.distributed.preempt import Stopped, StopRequest, end_at_once  # noqa: E402
from pipeline.host.keyboard import keep_launcher_from_keys  # noqa: E402
from pipeline.host.threads import BusyCores, share_cores, wait_briefly  # noqa: E402

if __name__ == "__main__":
    end_at_once()  # what follows takes seconds to import
    keep_launcher_from_keys()
    wait_briefly()

import faulthandler  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import replace  # noqa: E402
from datetime import timedelta  # noqa: E402
from typing import Any  # noqa: E402

from data_prep.manifest import ManifestError, find_splits, is_prepared  # noqa: E402
from data_prep.program import outlive_readers  # noqa: E402
from pipeline.config.command_line import Launch, describe  # noqa: E402
from pipeline.config.dry_run_options import DryRun, take_dry_run  # noqa: E402
from pipeline.config.options import ConfigError, weighted_paths  # noqa: E402
from pipeline.data.tokenizer_source import tokenizer_source  # noqa: E402
from pipeline.distributed.endings import say  # noqa: E402
from pipeline.distributed.host_memory import keep_freed_memory  # noqa: E402
from pipeline.distributed.places import Place, discover  # noqa: E402
from pipeline.weights.packaged import parse_settings  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Refuse every mistake that can be seen without torch, then run."""
    stop = StopRequest().listen(at_once=True)
    place = None
    try:
        place = discover(os.environ)
        options, words = take_dry_run(sys.argv[1:] if argv is None else argv)
        launch = parse_settings(words)
        if options is not None:
            return look_ahead(launch, options, place, stop)
        if place.world_size == 1:  # of several ranks each says, once they are connected, what it does not find
            check_prepared(launch)
        return run(launch, place, stop)
    except (Exception, Stopped) as error:
        return say(error, place)
    finally:
        stop.close()


def check_prepared(launch: Launch) -> None:
    """Raise ConfigError naming the command to run first, when the training data is not there."""
    for path, _ in weighted_paths(launch.config.data):
        if is_prepared(path, launch.config.data.train_split):
            continue
        try:
            find_splits(path, launch.config.data.train_split, num_images=None)
        except ManifestError as error:
            if path.is_dir():
                raise
            raise ConfigError(
                f"{path}: no such folder; run `python -m data_prep synth && python -m data_prep tokenizer` first, "
                "or name prepared data by --data DIR"
            ) from error
    tokenizer_source(launch.config)


def look_ahead(launch: Launch, options: DryRun, place: Place, stop: StopRequest) -> int:
    """Say what ``launch`` would be, train nothing but the steps that are to be measured; returns the exit code."""
    if not place.is_main and not options.steps:
        return 0
    prepare_host()
    from pipeline.dry_run.running import dry_run

    def set_up_and_drive(short: Launch, drive: Any, take_down: Any) -> int:
        return run(short, place, stop, drive=drive, take_down=take_down)

    return dry_run(launch, options, place, set_up_and_drive)


def prepare_host() -> None:
    """What must be settled before DeepSpeed is imported, and before much memory is allocated."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no other
        keep_freed_memory()


def run(
    launch: Launch,
    place: Place,
    stop: StopRequest,
    task: Any = None,
    drive: Callable[[Any], int] | None = None,
    take_down: Callable[[Any], None] | None = None,
) -> int:
    """Connect the ranks, set up, train; never returns where a rank must leave by itself.

    ``task`` (a ``tasks.task.Task``) is the one that the configuration names, if not given. A ``drive`` gets the session
    in place of the training loop, and ``take_down`` the end in place of the run folder.

    Raises:
        ValueError: the ranks do not meet.
    """
    busy = BusyCores()
    prepare_host()
    from pipeline.cluster.heartbeats import Heartbeats, Pulse, limits_of
    from pipeline.cluster.last_words import LastWordsFile
    from pipeline.distributed.rendezvous import MEETING_SECONDS, meet
    from pipeline.distributed.watch import Watch

    is_new = place.is_main and not launch.output.exists()
    faulthandler.enable()  # an abort inside a library, as NCCL's after a timeout, shows where every thread is
    meeting = meet(place)
    watch = Watch(place, meeting.store, meeting.address)
    stop.when_stuck = lambda stopped: watch.end_by(stopped, setting_up=True)
    session = None
    step = lambda: None if session is None else session.state.step  # noqa: E731
    watch.take_down = take_down or LastWordsFile(launch.output, step, place.is_main).write
    try:
        watch.wait_for_all(MEETING_SECONDS)
        heartbeats = Heartbeats(watch, pulse := Pulse(), limits_of(launch.config.train))
        if place.world_size > 1 or not (sys.stdin and sys.stdin.isatty()):  # somebody may sit at a debugger
            heartbeats.start()
        from pipeline.distributed.connecting import connect_ranks
        from pipeline.finetuning.table import task_of
        from pipeline.training.loop import train
        from pipeline.training.session import resolve_ds_config, set_up

        silence = timedelta(minutes=launch.config.train.collective_timeout_minutes)
        ranks = connect_ranks(place, stop, meeting, watch.own_address, silence)
        ds_config = resolve_ds_config(launch, ranks.place, ranks.device)
        if place.world_size > 1:
            check_prepared(launch)
        if drive is None:
            ranks.say(describe(launch))
        workers = launch.config.data.num_workers if ranks.device.type == "cuda" else 0
        threads = share_cores(ranks.agreement, busy, workers)
        ranks.say("\n".join(threads.lines))
        ranks = replace(ranks, threads=threads._asdict())
        prepared = set_up(launch, ds_config, task or task_of(launch.config), ranks)
        stop.poll_from_here()
        session, prepared.pulse = prepared, pulse
        if drive is None:
            heartbeats.write_to(launch.output)
        code = (drive or train)(session)
    except BaseException as error:  # said, and the process ended: the other ranks would wait for this one for ever
        stop.ignore()  # a launcher signals the ranks that are left
        if is_new and isinstance(error, Stopped) and error.by_keyboard:
            shutil.rmtree(launch.output, ignore_errors=True)  # nobody asks it how this attempt ended
        known = None if session is None else session.batches.failure(error)
        watch.end_by(known or error, setting_up=session is None)
    watch.finish(code, ranks.agreement.wait, session.reason)


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
