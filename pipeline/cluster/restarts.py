"""RUN/attempts.jsonl: every attempt at a run with how it ended, and whether its job is started again."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.checkpoint.folders import newest_saved_step
from pipeline.cluster import heartbeats
from pipeline.cluster.last_words import LastWords, attempt_number, job_name, read_last_words
from pipeline.distributed.endings import EXIT_BUG, EXIT_DONE, EXIT_MEND

NAME = "attempts.jsonl"
_FIELDS = {  # of a record, by its event
    "begin": {"job", "attempt", "step", "hosts"},
    "end": {"job", "attempt", "code", "nodes", "saved_step", "stopped", "ending", "requeued"},
}
BAD_NODE = 2  # failures that begin on the same node, after which it is kept out


class End(NamedTuple):
    """How the step of a job ended, by its script."""

    job: str
    attempt: int
    code: int
    nodes: Sequence[str]


class Limits(NamedTuple):
    max_restarts: int
    same_failure: int


class Decision(NamedTuple):
    """What comes next."""

    requeue: bool
    code: int  # of the job, where it is not started again
    line: str  # what happens and why
    excluded: list[str]  # nodes to keep out of the next attempt


def begin(
    run: Path,
    step: int,
    hosts: Sequence[str],
    environment: Mapping[str, str] = os.environ,
    topology: Mapping[str, Any] | None = None,
) -> None:
    """Note that an attempt at a run begins, after ``step``, with a rank on each of ``hosts``, in that ``topology``.

    Rank 0 calls it, once the run is its own.
    """
    (run / heartbeats.NAME).unlink(missing_ok=True)
    record = {"event": "begin", "job": job_name(environment), "attempt": attempt_number(environment)}
    _append(run, record | {"step": step, "hosts": list(hosts), "topology": dict(topology or {})})


def conclude(run: Path, end: End, limits: Limits) -> Decision:
    """Decide what follows from the end of an attempt, and note both.

    Raises:
        OSError: it can't be noted; then the job must not be started again, as nobody would count.
    """
    attempts = read_attempts(run)
    before = [one for one in attempts if one["event"] == "end" and one["job"] == end.job]
    words = _words_of(end, run, attempts)
    failure = {
        "event": "end",
        **{"job": end.job, "attempt": end.attempt, "code": end.code, "nodes": list(end.nodes)},
        "saved_step": newest_saved_step(run),
        "stopped": words is not None and words.stopped,
        "ending": None if words is None else words._asdict(),
    }
    ends = [*before, failure]
    refusal = _refusal(ends, attempts, limits)
    excluded = [] if refusal else _nodes_to_exclude(ends)
    if run.is_dir() or not refusal:  # a mistake before the run began leaves no folder
        run.mkdir(parents=True, exist_ok=True)
        _append(run, failure | {"requeued": refusal is None, "excluded": excluded})
    what = f"attempt {end.attempt} of job {end.job} ended with exit code {end.code}, {_explain(failure)}"
    used = f"{_charged(ends, attempts)} of {limits.max_restarts} restarts are used"
    line = f"{what}: {f'not started again: {refusal}' if refusal else f'started again; {used}'}"
    return Decision(refusal is None, EXIT_MEND if _cause(failure) == EXIT_MEND else end.code, line, excluded)


def read_attempts(run: Path) -> list[dict[str, Any]]:
    """The records of a run's attempts in order; lines that a kill has torn are left out."""
    try:
        lines = (run / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [record for line in lines if (record := _parse(line)) is not None]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    known = isinstance(record, dict) and _FIELDS.get(record.get("event"))
    return record if known and record.keys() >= known else None


def _append(run: Path, record: Mapping[str, Any]) -> None:
    """Add one line by a single write, below a last line that a kill has torn."""
    line = json.dumps({"time": round(time.time(), 3), **record}) + "\n"
    with open(run / NAME, "ab+", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - 1, 0))
        torn = stream.read(1) not in (b"", b"\n")
        stream.write(b"\n" * torn + line.encode())


def _words_of(end: End, run: Path, attempts: Sequence[Mapping[str, Any]]) -> LastWords | None:
    """What a rank of this attempt left, and not what one of an earlier attempt did."""
    words = read_last_words(run)
    if words is None or words.attempt != end.attempt or words.job not in (None, end.job):
        return None
    told = [one["ending"]["time"] for one in attempts if one.get("ending")]
    return None if words.time in told else words


def _refusal(ends: list[dict[str, Any]], attempts: Sequence[Mapping[str, Any]], limits: Limits) -> str | None:
    """Why the job must not be started again, None where it may."""
    last = ends[-1]
    if _cause(last) == EXIT_MEND:
        return "it would end the same way; mend that and submit it again"
    failures = [_kind(one) for one in ends if not one["stopped"]]
    same = next((number for number, kind in enumerate(reversed(failures)) if kind != failures[-1]), len(failures))
    if not last["stopped"] and same >= limits.same_failure:
        saved = "before the first checkpoint" if last["saved_step"] is None else f"after step {last['saved_step']}"
        return f"the same failure {same} times in a row {saved}; mend its cause and submit it again"
    if _charged(ends, attempts) > limits.max_restarts:
        return f"{limits.max_restarts} restarts are used up (--max-restarts); look at RUN/{NAME} and submit it again"
    return None


def _cause(end: Mapping[str, Any]) -> int:
    """The exit code of the rank that the end began with: the job's may be of one that was ended by it."""
    ending = end["ending"]
    if end["code"] == EXIT_MEND or ending is None or ending["code"] == EXIT_DONE:
        return end["code"]
    return ending["code"]


def _kind(end: Mapping[str, Any]) -> tuple[int | None, int, str]:
    """What two equal failures have in common; numbers in the reason, as of ports and processes, do not count."""
    reason = end["ending"]["reason"] if end["ending"] else ""
    return end["saved_step"], _cause(end), re.sub(r"\d+", "#", reason)


def _charged(ends: Sequence[Mapping[str, Any]], attempts: Sequence[Mapping[str, Any]]) -> int:
    """Attempts of a job that count against its restarts: not those that saved a newer step and were told to stop."""
    job, charged, newest = ends[0]["job"], 0, None
    started: dict[int, int] = {one["attempt"]: one["step"] for one in attempts if _begins(one, job)}
    for one in ends:
        before = started.pop(one["attempt"], newest)
        newest = one["saved_step"]
        charged += not (one["stopped"] and newest is not None and (before is None or newest > before))
    return charged + len(started)  # what is left began, and nobody told how it ended


def _begins(record: Mapping[str, Any], job: str) -> bool:
    return record["event"] == "begin" and record["job"] == job


def _nodes_to_exclude(ends: Sequence[Mapping[str, Any]]) -> list[str]:
    """Nodes of the last attempt on which failures of the machine began again and again."""
    named = [one["ending"]["host"] for one in ends if _is_of_the_machine(one)]
    excluded = {node for one in ends for node in one.get("excluded", ())}
    return [node for node in ends[-1]["nodes"] if named.count(node) >= BAD_NODE and node not in excluded]


def _is_of_the_machine(end: Mapping[str, Any]) -> bool:
    known = end["ending"] is not None and end["ending"]["names_cause"] and not end["stopped"]
    return known and _cause(end) not in (EXIT_DONE, EXIT_BUG, EXIT_MEND)


def _explain(end: Mapping[str, Any]) -> str:
    ending = end["ending"]
    if ending is None:
        return "nobody said why"
    if ending["code"] == EXIT_DONE:
        return "though the run is done"
    return f"rank {ending['rank']} on {ending['host']}: {ending['reason']}"
