"""What a run folder says about a job, running or ended: where it is, how fast, who is slow, what went wrong."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint.folders import newest_saved_step
from pipeline.cluster import heartbeats, restarts
from pipeline.cluster.last_words import LastWords, read_last_words
from pipeline.config.options import ConfigError
from pipeline.distributed.endings import EXIT_DONE
from pipeline.recording.run_log import LOG_NAME, read_events, read_log

RECENT = 20  # lines of the log that tell of the present
MISSED_BEATS = 2.5  # of the file: so long without a new one, and it is told
SLOW = 1.3  # times the middle rank
SLOW_SHARE = 0.05  # of a step: less is not worth a word
SILENT, RUNNING = "not answering", "running"


class Pulse:
    """Whether the beat in RUN/heartbeat.json moves, on the reader's clock: file times and clocks of hosts lie."""

    def __init__(self, run: Path, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._run, self._clock, self._sleep = run, clock, sleep
        self._beat: Any = None
        self._since = clock()
        self._moved_at: float | None = None

    def read(self) -> tuple[dict[str, Any] | None, bool]:
        """The content of the file, and whether it moves; the first time waits for that."""
        content = self._look()
        while content is not None and self._moved_at is None and not self._is_late(content):
            self._sleep(0.5)
            content = self._look()
        return content, self._moved_at is not None and content is not None and not self._is_late(content)

    def _look(self) -> dict[str, Any] | None:
        content = _read_json(self._run / heartbeats.NAME)
        if content is None or not content.keys() >= {"beat", "step", "phase", "doing", "behind"}:
            return None
        beat = content.get("pid"), content["beat"]
        if beat != self._beat:
            self._since, self._moved_at = self._clock(), self._clock() if self._beat is not None else None
            self._beat = beat
        return content

    def _is_late(self, content: Mapping[str, Any]) -> bool:
        return self._clock() - self._since > MISSED_BEATS * float(
            content.get("every_seconds", heartbeats.WRITE_SECONDS)
        )


class StatusReader:
    """Reads a run folder again and again."""

    def __init__(
        self, run: Path, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """Raises ConfigError where there is no run."""
        if not any((run / name).is_file() for name in (LOG_NAME, restarts.NAME, "config.yaml")):
            raise ConfigError(f"{run}: no run (neither {LOG_NAME} nor {restarts.NAME} in it); name its --output folder")
        self._run, self._pulse = run, Pulse(run, clock, sleep)

    def read(self) -> dict[str, Any]:
        """Everything, as plain JSON; null where it is not known."""
        run = self._run
        attempts, records = restarts.read_attempts(run), read_log(run / LOG_NAME)
        train = [one for one in records if one["kind"] == "train"]
        total, saved = _total_steps(run), newest_saved_step(run)
        last = train[-1]["step"] if train else 0
        early = any(one["kind"] == "early_stop" and one["step"] >= last for one in records)
        done = early or (saved is not None and saved == total)
        state, why, beat = self._state(attempts, done)
        live = beat if state == RUNNING else None
        step = max(live["step"] - 1 if live else 0, last, saved or 0)
        hosts = next((one["hosts"] for one in reversed(attempts) if one["event"] == "begin"), [])
        checkpoint = next((one for one in reversed(records) if one["kind"] == "checkpoint"), None)
        seconds = _seconds_a_step(train)
        return {
            "run": str(run),
            "state": state,
            "why": why,
            "step": step,
            "steps": total,
            "eta_seconds": None if seconds is None or total is None or done else (total - step) * seconds,
            "samples_per_second": _middle(train, "samples_per_second"),
            "step_seconds": _middle(train, "step_seconds"),
            "data_wait_share": _middle(train, "data_wait_share"),
            "loss": train[-1].get("loss") if train else None,
            "doing": {name: live[name] for name in ("phase", "doing", "step")} if live else None,
            "checkpoint": {"step": saved, "seconds": None if checkpoint is None else checkpoint.get("seconds")},
            "world_size": len(hosts) or None,
            "hosts": sorted(set(hosts)),
            "slow_ranks": slow_ranks(train[-RECENT:], hosts),
            "behind": beat["behind"] if beat and state in (RUNNING, SILENT) else [],
            "incidents": _incidents(run),
            "attempts": _attempts(attempts),
        }

    def _state(self, attempts: Sequence[Mapping[str, Any]], done: bool) -> tuple[str, str | None, dict | None]:
        """A word for it, a line that says why, and the beat."""
        last, words = attempts[-1] if attempts else None, read_last_words(self._run)
        if words is None and last is not None and last["event"] == "end" and last["ending"]:
            words = LastWords(**last["ending"])
        if words is None and (last is None or last["event"] == "begin"):
            beat, moves = self._pulse.read()
            if moves:
                return RUNNING, None, beat
            if beat is None and last is not None:
                return RUNNING, "no heartbeat yet: it is setting up", None
            if beat is not None:
                return SILENT, "no new heartbeat: killed without a word, or this host sees old files; see --watch", beat
            return ("done", None, None) if done else ("unknown", "nothing tells of its end", None)
        reason = words.reason if words else "nobody said why"
        where = f"rank {words.rank} on {words.host}: " if words and not words.stopped else ""
        if words is not None and words.code == EXIT_DONE:
            if done:
                return "done", None, None
            return "incomplete", "it ended with 0 before its last step was saved; start it again", None
        ended = last is not None and last["event"] == "end"
        if ended and last["requeued"]:
            return "to be started again", where + reason, None
        return ("stopped" if words and words.stopped else "failed"), where + reason, None


def slow_ranks(train: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> list[dict[str, Any]]:
    """Ranks that were the slowest in most of these lines, by far enough, in reading data or in forward passes."""
    found = []
    for name, what in (("data_wait", "waits for its data"), ("forward", "computes")):
        lines = [one for one in train if f"slowest_{name}_rank" in one]
        slow = [one for one in lines if _is_slow(one, name)]
        ranks = Counter(int(one[f"slowest_{name}_rank"]) for one in slow)
        for rank, count in ranks.most_common(1):
            if 2 * count > len(lines):
                own = [one for one in slow if one[f"slowest_{name}_rank"] == rank]
                found.append({
                    "rank": rank,
                    "host": hosts[rank] if rank < len(hosts) else None,
                    "what": what,
                    "seconds": statistics.median(one[f"slowest_{name}_seconds"] for one in own),
                    "others_seconds": statistics.median(one[f"{name}_seconds"] for one in own),
                })  # fmt: skip
    return found


def _is_slow(line: Mapping[str, Any], name: str) -> bool:
    slowest, middle = line[f"slowest_{name}_seconds"], line[f"{name}_seconds"]
    return slowest > SLOW * middle and slowest - middle > SLOW_SHARE * line["step_seconds"]


def _total_steps(run: Path) -> int | None:
    try:
        return int(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["train"]["steps"])
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _seconds_a_step(train: Sequence[Mapping[str, Any]]) -> float | None:
    """Of late, evaluations and saves in between counted."""
    recent = [one for one in train[-RECENT:] if "time" in one]
    if len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return _middle(train, "step_seconds")
    steps = [after["step"] - before["step"] for before, after in zip(recent, recent[1:])]
    pauses = [(after["time"] - before["time"]) / n for before, after, n in zip(recent, recent[1:], steps) if n > 0]
    usual = statistics.median(pauses)
    kept = [min(one, 100 * usual) for one in pauses]  # not the night between two attempts
    return statistics.fmean(kept)


def _middle(train: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = [one[name] for one in train[-RECENT:] if name in one]
    return statistics.median(found) if found else None


def _incidents(run: Path) -> dict[str, Any]:
    events = read_events(run / LOG_NAME)
    last = events[-1] if events else None
    what = None if last is None else str(last.get("message") or last.get("reason") or last["kind"])
    return {**Counter(one["kind"] for one in events), "last": what, "last_step": None if last is None else last["step"]}


def _attempts(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ends = [one for one in attempts if one["event"] == "end"]
    return {
        "job": attempts[-1]["job"] if attempts else None,
        "begun": sum(one["event"] == "begin" for one in attempts),
        "failed": sum(not one["stopped"] for one in ends),
        "stopped": sum(one["stopped"] for one in ends),
        "excluded": sorted({node for one in ends for node in one.get("excluded", ())}),
    }


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else None
    except (OSError, ValueError):
        return None
