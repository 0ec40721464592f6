"""Checks the nodes of a job before it trains: devices, network, disks, clocks, limits, what earlier jobs left.

    srun --ntasks-per-node=1 python -m pipeline.health [--run RUN] [--data DIR...] [--output FILE] [--skip-network]

stdout: a line for each node, and `unfit NODE: why` for each that should be kept out of the job.
Exit codes: 0 all are fit, 75 not all (start it again without those), 2 no other node would help: mend it.
"""

from __future__ import annotations

from pipeline.distributed.preempt import Stopped, StopRequest, end_at_once

if __name__ == "__main__":
    end_at_once()  # what follows takes seconds to import

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from datetime import timedelta  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from data_prep.manifest import write_atomically  # noqa: E402
from data_prep.program import run_program  # noqa: E402
from pipeline.cluster.node_health import MIB, Report, check_node, judge  # noqa: E402
from pipeline.config.program_options import number, program_parser  # noqa: E402
from pipeline.distributed.endings import say  # noqa: E402
from pipeline.distributed.places import Place, discover  # noqa: E402

SILENCE = timedelta(minutes=3)  # of a collective: a network that does not carry it is found here, not in the training
ALL_REDUCE_BYTES = 16 * MIB


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code, but on several ranks that are connected, where the process ends with it."""
    arguments = _parser().parse_args(argv)
    stop = StopRequest().listen(at_once=True)
    place = None
    try:
        place = discover(os.environ)
        if place.world_size == 1 or arguments.skip_network:
            report = check_node(arguments.run, arguments.data, arguments.min_free_gib)
            return _tell([report], arguments.output if place.is_main else None)
        return _together(arguments, place, stop)
    except (Exception, Stopped) as error:
        return say(error, place)
    finally:
        stop.close()


def _together(arguments: argparse.Namespace, place: Place, stop: StopRequest) -> int:
    from pipeline.distributed.connecting import connect_ranks
    from pipeline.distributed.rendezvous import MEETING_SECONDS, meet
    from pipeline.distributed.watch import Watch

    meeting = meet(place)
    watch = Watch(place, meeting.store, meeting.address)
    stop.when_stuck = lambda stopped: watch.end_by(stopped, setting_up=True)
    try:
        watch.wait_for_all(MEETING_SECONDS)
        report = check_node(arguments.run, arguments.data, arguments.min_free_gib)  # before the network may hang
        ranks = connect_ranks(place, stop, meeting, watch.own_address, SILENCE)
        code = _compare(report, ranks, arguments.output)
    except BaseException as error:
        stop.ignore()
        watch.end_by(error, setting_up=True)
    watch.finish(code, ranks.agreement.wait)


def _compare(report: Report, ranks: Any, output: Path | None) -> int:
    """Measure the network, and judge all nodes on rank 0; every rank must call it."""
    from pipeline.distributed.bandwidth import all_reduce_bytes_per_second, clock_offset_seconds

    agreement = ranks.agreement
    report.clock_seconds = clock_offset_seconds(agreement)
    if not any(agreement.gather(bool(report.unfit))):  # or what is known is told before a broken device hangs
        report.mib_per_second["all-reduce"] = all_reduce_bytes_per_second(ALL_REDUCE_BYTES, ranks.device) / MIB
    reports = agreement.gather(report)
    firsts = list({one.node: one for one in reversed(reports)}.values())[::-1]  # of several ranks of a node the first
    code = _tell(firsts, output) if agreement.is_main else None
    return agreement.from_main(code)


def _tell(reports: list[Report], output: Path | None) -> int:
    code = judge(reports)
    for report in reports:
        print(report.line())
    for report in reports:
        for reason in report.unfit:
            print(f"unfit {report.node}: {reason}")
        for reason in report.mend:
            print(f"error: {report.node}: {reason}", file=sys.stderr)
    sys.stdout.flush()
    if output is not None:
        content = {"exit_code": code, "nodes": [report.to_json() for report in reports]}
        write_atomically(output, json.dumps(content, indent=1) + "\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = program_parser("pipeline.health", __doc__)
    parser.add_argument("--run", type=Path, metavar="RUN", help="the --output folder of the training")
    parser.add_argument("--data", type=Path, nargs="+", default=[], metavar="DIR", help="folders that nodes must see")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the reports as JSON here")
    free = "room that the run's disk must have (default: 1)"
    parser.add_argument("--min-free-gib", type=number("GiB", zero=True), default=1.0, metavar="G", help=free)
    parser.add_argument("--skip-network", action="store_true", help="each node looks at itself alone")
    return parser


if __name__ == "__main__":
    run_program(main)
