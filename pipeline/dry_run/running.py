"""A dry run of the training program: what one rank says, and the steps that all ranks measure."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Protocol, TextIO

from pipeline.config.command_line import Launch
from pipeline.config.dry_run_options import DryRun
from pipeline.distributed.endings import EXIT_DONE, EXIT_MEND
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.dry_run.duration import Measured
from pipeline.dry_run.measuring import measure, remove_folder, short_launch
from pipeline.dry_run.outlook import Outlook
from pipeline.dry_run.page import page, time_section
from pipeline.training.session import Session


class SetUpAndDrive(Protocol):
    """Sets a training up on all ranks and hands its session to ``drive``, whose exit code it ends with; where it ends
    otherwise it calls ``take_down``. It may end the process."""

    def __call__(self, launch: Launch, drive: Callable[[Session], int], take_down: Callable[[object], None]) -> int: ...


def dry_run(launch: Launch, options: DryRun, place: Place, run: SetUpAndDrive) -> int:
    """Say what the run would be and cost; returns the exit code, 2 where training would refuse it.

    One rank speaks. Only a measurement needs the others, who must all call it then.
    """
    out, outlook, began = sys.stdout, None, time.perf_counter()
    if place.is_main:
        outlook = Outlook(launch, place)
        if not options.as_json:
            print(page(outlook), file=out, flush=True)
        if not options.steps or outlook.problems:
            code = _conclude(outlook, options, None, out)
            if not options.steps or place.world_size == 1:
                return code
    elif not options.steps:
        return EXIT_DONE
    short, spent = short_launch(launch, options.steps), time.perf_counter() - began

    def drive(session: Session) -> int:
        agreement = session.ranks.agreement
        if agreement.from_main(outlook is not None and bool(outlook.problems)):
            return _clear(agreement, EXIT_MEND)
        code, measured = measure(session, options.steps, spent)
        if outlook is not None and code == EXIT_DONE:
            code = _conclude(outlook, options, measured, out)
        return _clear(agreement, code)

    def _clear(agreement: Agreement, code: int) -> int:
        agreement.wait()
        if agreement.is_main:
            remove_folder(short)
        return code

    if place.is_main:
        remove_folder(short)
    with redirect_stdout(sys.stderr):
        return run(short, drive, lambda ending: remove_folder(short))


def _conclude(outlook: Outlook, options: DryRun, measured: Measured | None, out: TextIO) -> int:
    duration = outlook.time(measured, options.samples_per_second)
    if options.as_json:
        print(json.dumps(outlook.as_plain(duration), indent=1), file=out, flush=True)
    else:
        print(f"\n{time_section(outlook, duration)}", file=out, flush=True)
    return EXIT_MEND if outlook.problems else EXIT_DONE
