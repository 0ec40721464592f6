"""Heartbeats of all ranks at rank 0, and a watchdog that ends the run when one does not get on, and names it.

A heartbeat is a counter of what the main thread has passed, sent by a thread over the connection that every rank holds
to rank 0 (``distributed/watch.py``): no shared disk is touched, and hundreds of ranks are a few kilobytes a second.
Whether a rank gets on is judged by whether its counter moves, on the clock of the judge. Rank 0 writes the state of all
into one small file, RUN/heartbeat.json.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.options import TrainConfig
from pipeline.distributed.endings import EXIT_REQUEUE, Ending
from pipeline.distributed.watch import Watch

NAME = "heartbeat.json"
BEAT_SECONDS = 5.0
WRITE_SECONDS = 10.0
SILENT_BEATS = 4  # so many beats that do not come: the process is stopped, swapped out, or its node hangs
SHOWN = 8
SET_UP, STEP, EVALUATION, SAVING = "set-up", "step", "evaluation", "saving"
_COLLECTIVES = (os.path.join("torch", "distributed"), os.path.join("deepspeed", "comm"))
_OURS = str(Path(__file__).resolve().parents[2])


class Pulse:
    """What the main thread of this rank does; it says so wherever all ranks pass alike."""

    def __init__(self) -> None:
        self.count, self.phase, self.doing, self.step = 0, SET_UP, "sets up", 0

    def move(self, phase: str, doing: str, step: int | None = None) -> None:
        """One further; every rank must call it as often, in the same order."""
        self.phase, self.doing = phase, doing
        self.step = self.step if step is None else step
        self.count += 1


class Beat(NamedTuple):
    """What a rank says of itself."""

    count: int
    phase: str
    doing: str
    step: int
    waits: bool  # for other ranks, in a collective
    where: str  # the line of ours that its main thread is in


@dataclass
class Heard:
    """The last beat of a rank, and when it came and when its counter moved, in seconds of the reader's clock."""

    beat: Beat
    at: float
    moved_at: float


def limits_of(train: TrainConfig) -> dict[str, float]:
    """Seconds that a rank may be at one count, by phase."""
    minutes = {
        SET_UP: train.set_up_timeout_minutes,
        STEP: train.step_timeout_minutes,
        EVALUATION: train.evaluation_timeout_minutes,
        SAVING: train.save_timeout_minutes,
    }
    return {phase: 60 * number for phase, number in minutes.items()}


class Heartbeats:
    """The beats of this rank, and on rank 0 those of all."""

    def __init__(
        self, watch: Watch, pulse: Pulse, limits: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._watch, self._pulse, self._limits, self._clock = watch, pulse, dict(limits), clock
        self._main_thread = threading.main_thread().ident
        self._heard: dict[int, Heard] = {}
        self._began = self._last_beat = clock()
        self._lock = threading.Lock()
        watch.on_note = self.hear

    def start(self) -> Heartbeats:
        """Beat, and judge, in a thread until the process ends."""
        threading.Thread(target=_again_and_again, args=(BEAT_SECONDS, self.beat), daemon=True, name="heartbeat").start()
        return self

    def write_to(self, run: Path) -> None:
        """On rank 0: write the state of all ranks into the run folder, in a thread that a disk may hold up."""
        if self._watch.place.is_main:
            writer = _Writer(run / NAME, self.state)
            thread = threading.Thread(target=_again_and_again, args=(WRITE_SECONDS, writer.write), daemon=True)
            thread.start()

    def beat(self) -> None:
        """Send this rank's beat, and end the run if it is time to."""
        self._leave_out_own_pause()
        pulse = self._pulse
        waits, where = _place_in_code(sys._current_frames().get(self._main_thread))
        beat = Beat(pulse.count, pulse.phase, pulse.doing, pulse.step, waits, where)
        self.hear(self._watch.place.rank, beat._asdict())
        self._watch.send_note(beat._asdict())
        ending = self.verdict()
        if ending is not None:
            self._watch.end_all(ending)

    def hear(self, rank: int, note: Mapping[str, Any]) -> None:
        """A rank's beat has come; raises TypeError for anything else."""
        beat, now = Beat(**note), self._clock()
        with self._lock:
            known = self._heard.get(rank)
            moved = known is None or known.beat.count != beat.count
            self._heard[rank] = Heard(beat, now, now if moved else known.moved_at)

    def verdict(self) -> Ending | None:
        """On rank 0: the end of the run because of a rank that does not get on; on the others because of rank 0."""
        with self._lock:
            heard = dict(self._heard)
        if not self._watch.place.is_main:
            return self._verdict_on_main(heard)
        now, hosts = self._clock(), self._watch.hosts
        nothing = self._never_heard()
        behind = _behind({rank: heard.get(rank, nothing) for rank in range(self._watch.place.world_size)})
        furthest = _furthest(heard)
        if not any(self._is_over(one, furthest, now) for one in behind.values()):
            return None
        silent = {rank: one for rank, one in behind.items() if self._is_silent(one, now)}
        busy = {rank: one for rank, one in behind.items() if not one.beat.waits}
        slow = silent or busy or behind
        rank, one = next(iter(slow.items()))
        others = [f"{rank} on {hosts.get(rank, '?')}" for rank in list(slow)[1 : 1 + SHOWN]]
        beside = f"; so do ranks {', '.join(others)}" if others else ""
        reason = f"{self._complaint(one, furthest, now)}{beside}; the stacks of all ranks are shown"
        return Ending(rank, hosts.get(rank, "?"), EXIT_REQUEUE, reason, dump_stacks=True, names_cause=len(slow) == 1)

    def _leave_out_own_pause(self) -> None:
        """A judge that was stopped itself, as by `scontrol suspend`, heard nothing meanwhile: that time is nobody's."""
        now = self._clock()
        pause, self._last_beat = now - self._last_beat, now
        if pause > SILENT_BEATS * BEAT_SECONDS:
            with self._lock:
                self._began += pause
                for one in self._heard.values():
                    one.at, one.moved_at = min(one.at + pause, now), min(one.moved_at + pause, now)

    def state(self) -> dict[str, Any]:
        """What rank 0 knows of all ranks, for people: where they are, and which are behind."""
        with self._lock:
            heard = dict(self._heard)
        now, own, hosts = self._clock(), self._pulse, self._watch.hosts
        slow = _behind(heard) if len({one.beat.count for one in heard.values()}) > 1 else {}
        slow = {rank: one for rank, one in slow.items() if now - one.moved_at > 2 * BEAT_SECONDS}
        late = {rank: one for rank, one in heard.items() if self._is_silent(one, now)}
        shown = [
            {"rank": rank, "host": hosts.get(rank, "?"), "doing": one.beat.doing, "silent": rank in late}
            | {"seconds": round(now - one.moved_at, 1), "where": one.beat.where}
            for rank, one in sorted((slow | late).items(), key=lambda item: item[1].moved_at)[:SHOWN]
        ]
        counters = {"world_size": self._watch.place.world_size, "heard_of": len(heard)}
        return {"phase": own.phase, "doing": own.doing, "step": own.step, **counters, "behind": shown}

    def _verdict_on_main(self, heard: Mapping[int, Heard]) -> Ending | None:
        main, furthest, now = heard.get(0, self._never_heard()), _furthest(heard), self._clock()
        if not (self._is_silent(main, now) and self._is_over(main, furthest, now)):
            return None  # as long as it is heard of, it judges itself
        reason = f"{self._complaint(main, furthest, now)}; the stacks of all others are shown"
        return Ending(0, self._watch.hosts.get(0, "?"), EXIT_REQUEUE, reason, dump_stacks=True)

    def _never_heard(self) -> Heard:
        """What stands for a rank that has sent no beat: it may have been stopped before its first one."""
        return Heard(Beat(-1, SET_UP, "sets up", 0, waits=False, where=""), self._began, self._began)

    def _is_over(self, one: Heard, furthest: Heard | None, now: float) -> bool:
        """Whether a rank has not moved for longer than it may: than its phase may last, and since it is silent than the
        phase may last in which others wait for it, as it may have got there since its last beat."""
        if self._overtaken(one, furthest, now):
            return now - max(one.at, furthest.moved_at) > self._limits[furthest.beat.phase]
        return now - one.moved_at > self._limits[one.beat.phase]

    def _overtaken(self, one: Heard, furthest: Heard | None, now: float) -> bool:
        return furthest is not None and furthest.beat.count > one.beat.count and self._is_silent(one, now)

    def _is_silent(self, one: Heard, now: float) -> bool:
        return now - one.at > SILENT_BEATS * BEAT_SECONDS

    def _complaint(self, one: Heard, furthest: Heard | None, now: float) -> str:
        beat = one.beat
        phase = furthest.beat.phase if self._overtaken(one, furthest, now) else beat.phase
        option = "save" if phase == SAVING else phase.replace("-", "_")
        if self._is_silent(one, now):
            what = (
                f"no heartbeat for {now - one.at:.0f} s: it is stopped, swapped out, or its node hangs; at the last it"
            )
        else:
            what = f"does not get on for {now - one.moved_at:.0f} s; it"
        where = f", in {beat.where}" if beat.where else ""
        return f"{what} {beat.doing}{where}, step {beat.step} (train.{option}_timeout_minutes)"


def _furthest(heard: Mapping[int, Heard]) -> Heard | None:
    return max(heard.values(), key=lambda one: one.beat.count, default=None)


def _behind(heard: Mapping[int, Heard]) -> dict[int, Heard]:
    """The ranks that all others wait for: those that have passed least."""
    least = min((one.beat.count for one in heard.values()), default=0)
    return {rank: one for rank, one in sorted(heard.items()) if one.beat.count == least}


def _place_in_code(frame: Any) -> tuple[bool, str]:
    """Whether a thread is in a collective, and the innermost line of ours that it is in."""
    waits = False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and "site-packages" not in file:
            return waits, f"{os.path.relpath(file, _OURS)}:{frame.f_lineno} {frame.f_code.co_name}"
        waits = waits or any(part in file for part in _COLLECTIVES)
        frame = frame.f_back
    return waits, ""


def _again_and_again(seconds: float, function: Callable[[], None]) -> None:
    while True:
        function()
        time.sleep(seconds)


class _Writer:
    """Writes the file with a counter, which a reader watches on its own clock: file times and clocks of hosts lie."""

    def __init__(self, path: Path, state: Callable[[], Mapping[str, Any]]) -> None:
        self._path, self._state, self._count = path, state, 0

    def write(self) -> None:
        """Replace the file in one step; not synced, as what a crash loses of it is worthless."""
        self._count += 1
        content = {"beat": self._count, "every_seconds": WRITE_SECONDS, "pid": os.getpid(), "time": time.time()}
        beside = self._path.with_name(f".{NAME}")  # one rank of one run writes it
        with suppress(OSError):
            beside.write_text(json.dumps(content | self._state()) + "\n", encoding="utf-8")
            os.replace(beside, self._path)
