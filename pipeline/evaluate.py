"""Scores a run, a checkpoint or an imported model on held-out data: a scorecard, and a prediction for every item.

    python -m pipeline.evaluate --run RUN [--task T] [--data DIR...] [--split dev] [--samples N] [--submission]

With several GPUs, or nodes, the same by a launcher; the ranks share the items, and the scorecard is the same:

    deepspeed --module pipeline.evaluate --run RUN ...
    torchrun --nproc-per-node 2 -m pipeline.evaluate --run-folder RUN ...
    mpirun -n 2 python -m pipeline.evaluate --run RUN ...
    srun python -m pipeline.evaluate --run RUN ...

Files go to RUN/evaluations/TASK-CORPUS-SPLIT-step_N. An evaluation that was stopped or killed goes on by the same
command.
Exit codes: 0 done, 1 a bug, 2 settings, data or a disk that must be mended, 75 told to stop or the machine failed.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path: not pipeline/, whose names shadow others

from pipeline.distributed.preempt import Stopped, StopRequest, end_at_once  # noqa: E402
from pipeline.host.keyboard import keep_launcher_from_keys  # noqa: E402
from pipeline.host.threads import wait_briefly  # noqa: E402

if __name__ == "__main__":
    end_at_once()  # what follows takes seconds to import
    keep_launcher_from_keys()
    wait_briefly()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
from typing import Any  # noqa: E402

from data_prep.program import outlive_readers, run_program  # noqa: E402
from pipeline.config.options import ConfigError  # noqa: E402
from pipeline.config.program_options import program_parser, whole_number  # noqa: E402
from pipeline.distributed.endings import EXIT_DONE, EXIT_REQUEUE, say  # noqa: E402
from pipeline.distributed.places import Place, discover  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code, but on several ranks, where the process ends with it."""
    stop = StopRequest(ends="after this batch").listen(at_once=True)
    place = None
    try:
        place = discover(os.environ)
        arguments, options = _parser().parse_known_args(sys.argv[1:] if argv is None else argv)
        return run(arguments, options, place, stop)
    except (Exception, Stopped) as error:
        return say(error, place)
    finally:
        stop.close()


def run(arguments: argparse.Namespace, options: list[str], place: Place, stop: StopRequest, task: Any = None) -> int:
    """Set up and score; never returns where there are several ranks.

    ``options`` are the words that the parser does not know. ``task`` (a ``tasks.task.Task``) is the one that the
    configuration names, if not given.
    """
    work = _Work(arguments, options, stop, task)
    return _alone(work, place) if place.world_size == 1 else _together(work, place)


class _Work:
    """An evaluation from its command line to its end, and what to make of an error in it."""

    def __init__(self, arguments: argparse.Namespace, options: list[str], stop: StopRequest, task: Any) -> None:
        from pipeline.scoring.subject import Request

        names = ("run", "task", "data", "split", "samples", "batch_size", "submission", "output")
        self.request = Request(**{name: getattr(arguments, name) for name in names}, options=options)
        self.device, self.stop, self._task = arguments.device, stop, task
        self._evaluation: Any = None

    def do(self, ranks: Any, store: Any) -> int:
        """Every rank must call it; ``store`` is the one at which they met. Returns the exit code."""
        from pipeline.reporting.page import report_or_warn
        from pipeline.scoring.evaluation_run import carry_out, set_up

        self._evaluation = set_up(self.request, ranks, store, self._task)
        self.stop.poll_from_here()
        values = carry_out(self._evaluation)
        if values is None:
            ranks.say("stopped; the same command goes on", error=True)
            return EXIT_REQUEUE
        ranks.say(json.dumps({name: round(value, 6) for name, value in values.items()}, indent=1))
        subject = self._evaluation.subject
        if ranks.place.is_main and self.request.output is None and subject.config.tracking.report:
            report_or_warn(subject.run, sys.stderr)
        return EXIT_DONE

    def cause(self, error: BaseException) -> tuple[BaseException, bool]:
        """What is behind an error, and whether it is a user's mistake if it is a ValueError."""
        found = None if self._evaluation is None else self._evaluation.failure(error)
        return found or error, self._evaluation is None or isinstance(error, ConfigError)

    def close(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()


def _alone(work: _Work, place: Place) -> int:
    from pipeline.distributed.connecting import Ranks
    from pipeline.distributed.ranks import Agreement

    try:
        return work.do(Ranks(place, _device(work.device), Agreement(), work.stop), None)
    except BrokenPipeError:  # nobody reads stdout any more
        raise
    except (Exception, Stopped) as error:
        return say(work.cause(error)[0], place, work.cause(error)[1])
    finally:
        work.close()


def _together(work: _Work, place: Place) -> int:
    from pipeline.distributed.connecting import connect_ranks
    from pipeline.distributed.rendezvous import MEETING_SECONDS, SILENCE, meet
    from pipeline.distributed.watch import Watch
    from pipeline.host.threads import share_cores

    outlive_readers()
    meeting = meet(place)
    watch = Watch(place, meeting.store, meeting.address)
    work.stop.when_stuck = lambda stopped: watch.end_by(stopped, setting_up=True)
    try:
        watch.wait_for_all(MEETING_SECONDS)
        device = _device("cpu") if work.device == "cpu" else None
        ranks = connect_ranks(place, work.stop, meeting, watch.own_address, SILENCE, device)
        ranks.say("\n".join(share_cores(ranks.agreement).lines), error=True)
        code = work.do(ranks, meeting.store)
    except BaseException as error:  # said, and the process ended: the other ranks would wait for this one for ever
        work.stop.ignore()  # a launcher signals the ranks that are left
        watch.end_by(*work.cause(error))
    watch.finish(code, ranks.agreement.wait)


def _device(name: str | None) -> Any:
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # what PyTorch raises for a device that is not here
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(f"--device {name}: not usable here ({reason}); cpu always is") from None


def _parser() -> argparse.ArgumentParser:
    parser = program_parser("pipeline.evaluate", __doc__)
    subject = "run folder, one of its checkpoint folders, or an imported model"
    run = ("--run", "--run-folder")  # torchrun takes --run for its own --run-path, whatever stands before it
    parser.add_argument(*run, dest="run", type=Path, required=True, metavar="RUN", help=subject)
    parser.add_argument("--task", metavar="NAME", help="what to score it at (default: what it was trained for)")
    parser.add_argument("--data", nargs="+", metavar="DIR", help="data to evaluate on (default: the run's)")
    parser.add_argument("--split", help="split to evaluate on (default: the run's data.eval_split)")
    parser.add_argument("--samples", type=whole_number(), help="held-out samples, evenly spaced (default: all)")
    parser.add_argument("--batch-size", type=whole_number(), help="samples at a time (default: optim.micro_batch_size)")
    parser.add_argument("--submission", action="store_true", help="write the official results file, checked")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for scorecards (default: RUN/evaluations)")
    device = "torch device (default: a GPU where there is one, else cpu; of several ranks each has its own)"
    parser.add_argument("--device", help=device)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # written by the deepspeed launcher
    option = "options of the task that say how it is scored, such as --task.decoding beam"
    parser.add_argument_group("further options", f"--task.OPTION VALUE: {option}")
    return parser


if __name__ == "__main__":
    run_program(main)
