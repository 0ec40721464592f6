"""A rank that does not get on is named and ends the run; one that only takes long, in its phase's time, does not."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.cluster import heartbeats as heartbeats_module
from pipeline.cluster.heartbeats import (
    EVALUATION,
    SAVING,
    SET_UP,
    STEP,
    Beat,
    Heartbeats,
    Pulse,
    _place_in_code,
    limits_of,
)
from pipeline.config.options import TrainConfig
from pipeline.distributed import watch as watch_module
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.distributed.watch import Watch
from tests.forked_ranks import run_ranks
from tests.pipeline.distributed.test_watch import start, wait_for_ever

LIMITS = {SET_UP: 3000.0, STEP: 100.0, EVALUATION: 1000.0, SAVING: 2000.0}
HOST = socket.gethostname()


class FakeWatch:
    def __init__(self, world: int, rank: int = 0) -> None:
        self.place, self.hosts = Place(rank, world, 0, "environment"), {rank: f"n{rank}" for rank in range(world)}
        self.sent, self.endings = [], []
        self.send_note, self.end_all = self.sent.append, self.endings.append


class Judge:
    """Rank 0 among others, on a clock of its own."""

    def __init__(self, world: int = 3, rank: int = 0) -> None:
        self.now, self.watch = 0.0, FakeWatch(world, rank)
        self.beats = Heartbeats(self.watch, Pulse(), LIMITS, lambda: self.now)

    def hear(self, rank: int, count: int, phase: str = STEP, waits: bool = False) -> None:
        beat = Beat(count, phase, "computes", 7, waits, "model/flm.py:1 forward")
        self.beats.hear(rank, json.loads(json.dumps(beat._asdict())))

    def after(self, seconds: float, *said: tuple) -> str | None:
        """What is said of the run when all beats of the time have come as given: (rank, count, phase, waits)."""
        end = self.now + seconds
        while self.now < end:
            self.now += heartbeats_module.BEAT_SECONDS
            for one in said:
                self.hear(*one)
        found = self.beats.verdict()
        return None if found is None else found.line


def test_the_rank_that_has_passed_least_is_named() -> None:
    judge = Judge()
    assert judge.after(10, (0, 5), (1, 4), (2, 5)) is None
    assert judge.after(80, (0, 6, STEP, True), (1, 4), (2, 6, STEP, True)) is None
    line = judge.after(30, (0, 6, STEP, True), (1, 4), (2, 6, STEP, True))
    assert line == (
        "error: rank 1 on n1: does not get on for 115 s; it computes, in model/flm.py:1 forward, step 7 "
        "(train.step_timeout_minutes); the stacks of all ranks are shown"
    )
    assert judge.beats.verdict().names_cause and judge.beats.verdict().dump_stacks


def test_of_ranks_that_are_as_far_those_that_wait_for_others_are_not_named() -> None:
    judge = Judge()
    line = judge.after(120, (0, 4, STEP, True), (1, 4, STEP, True), (2, 4, STEP, False))
    assert line.startswith("error: rank 2 on n2: does not get on")


def test_a_rank_without_heartbeats_is_named_before_others() -> None:
    judge = Judge()
    judge.after(10, (0, 4), (1, 4), (2, 4))
    line = judge.after(120, (0, 4), (2, 4))
    assert line.startswith("error: rank 1 on n1: no heartbeat for 120 s: it is stopped, swapped out, or its node hangs")


def test_a_rank_that_was_never_heard_of_is_named() -> None:
    judge = Judge()
    assert judge.after(2990, (0, 0, SET_UP, True), (1, 0, SET_UP, True)) is None
    assert judge.after(30, (0, 0, SET_UP, True), (1, 0, SET_UP, True)).startswith("error: rank 2 on n2: no heartbeat")


def test_a_rank_that_stops_soon_after_its_last_beat_has_the_time_of_those_that_wait_for_it() -> None:
    """Stopped three seconds after set-up, it would otherwise have the hour that a set-up may take."""
    judge = Judge()
    judge.after(5, (0, 0, SET_UP), (1, 0, SET_UP), (2, 0, SET_UP))
    assert judge.after(95, (0, 4, STEP, True), (2, 4, STEP, True)) is None
    line = judge.after(20, (0, 4, STEP, True), (2, 4, STEP, True))
    assert line.startswith("error: rank 1 on n1: no heartbeat for") and "(train.step_timeout_minutes)" in line
    assert judge.beats.verdict().names_cause
    judge = Judge(rank=2)
    judge.hear(0, 0, SET_UP)
    assert judge.after(95, (2, 4, STEP, True)) is None
    assert judge.after(20, (2, 4, STEP, True)).startswith("error: rank 0 on n0: no heartbeat for 115 s")


def test_where_nobody_is_to_blame_all_are_named_and_no_node_is() -> None:
    judge = Judge()
    line = judge.after(120, (0, 4), (1, 4), (2, 4))
    assert "rank 0 on n0: does not get on" in line and "; so do ranks 1 on n1, 2 on n2; the stacks" in line
    assert not judge.beats.verdict().names_cause


@pytest.mark.parametrize(("phase", "limit"), [(SET_UP, 3000), (STEP, 100), (EVALUATION, 1000), (SAVING, 2000)])
def test_every_phase_has_a_time_of_its_own(phase: str, limit: float) -> None:
    judge = Judge()
    said = [(rank, 4, phase) for rank in range(3)]
    assert judge.after(limit, *said) is None and judge.after(15, *said) is not None


def test_those_that_wait_in_a_step_for_one_that_saves_have_its_time() -> None:
    """Or a long save of one rank, after which the others have gone on, would be an alarm."""
    judge = Judge()
    said = (0, 9, SAVING), (1, 10, STEP, True), (2, 10, STEP, True)
    assert judge.after(1990, *said) is None
    assert judge.after(30, *said).startswith("error: rank 0 on n0: does not get on")


def test_a_run_that_gets_on_slowly_is_no_alarm() -> None:
    judge = Judge()
    for count in range(20):
        assert judge.after(95, *((rank, count) for rank in range(3))) is None


def test_a_job_that_was_suspended_goes_on() -> None:
    """`scontrol suspend` stops all processes, and clocks go on; what came before is remembered."""
    judge = Judge(world=1)
    judge.beats._pulse.move(STEP, "computes", 3)
    for _ in range(19):
        judge.now += 5
        judge.beats.beat()
    judge.now += 50_000
    judge.beats.beat()
    for _ in range(2):
        judge.now += 5
        judge.beats.beat()
    assert judge.watch.endings == []  # 100 s of its own time
    judge.now += 5
    judge.beats.beat()
    assert len(judge.watch.endings) == 1


def test_clocks_of_other_hosts_and_a_late_thread_do_not_matter() -> None:
    """Counters are compared with what this judge heard before, and nothing that a rank sends is a time."""
    assert not any("time" in name or "second" in name for name in Beat._fields)


@pytest.mark.parametrize("heard_of", [0, 2], ids=["rank 0 was heard of", "its first beat never came"])
def test_rank_0_is_judged_by_the_others(heard_of: int) -> None:
    judge = Judge(rank=2)
    judge.hear(heard_of, 4)
    judge.now = 100.0
    assert judge.beats.verdict() is None
    judge.now = 101.0
    assert judge.beats.verdict().line.startswith("error: rank 0 on n0: no heartbeat for 101 s")


def test_a_beat_says_where_the_main_thread_is_and_ends_the_run_in_time() -> None:
    judge = Judge(world=1)
    judge.beats._pulse.move(STEP, "computes", 3)
    judge.beats.beat()
    (sent,) = judge.watch.sent
    assert sent["where"].startswith("pipeline/cluster/heartbeats.py") and sent["where"].endswith(" beat")
    assert (sent["count"], sent["phase"], sent["step"], sent["waits"]) == (1, STEP, 3, False)
    for _ in range(21):
        judge.now += 5
        judge.beats.beat()
    assert [one.rank for one in judge.watch.endings] == [0]


def in_a_collective(place: Place, seen: Path) -> tuple[bool, str]:
    """What a thread of rank 0 sees of the main thread, which waits for rank 1."""
    main, found = threading.main_thread().ident, [(False, "")]

    def look() -> None:
        while not found[0][0]:
            found[0] = _place_in_code(sys._current_frames()[main])
        seen.touch()

    if place.rank == 0:
        threading.Thread(target=look, daemon=True).start()
    while place.rank == 1 and not seen.exists():
        time.sleep(0.01)
    Agreement().wait()
    return found[0]


def test_a_rank_that_waits_for_others_is_known_by_where_it_is(tmp_path: Path) -> None:
    (waits, where), _ = run_ranks(2, in_a_collective, tmp_path / "seen")
    assert waits and where.startswith("pipeline/distributed/ranks.py:")


def test_the_options_are_minutes() -> None:
    limits = limits_of(TrainConfig(step_timeout_minutes=2, save_timeout_minutes=0.5))
    assert limits == {SET_UP: 3600, STEP: 120, EVALUATION: 1500, SAVING: 30}


def test_the_file_has_a_counter_and_the_ranks_that_are_behind(tmp_path: Path) -> None:
    judge = Judge()
    writer = heartbeats_module._Writer(tmp_path / "heartbeat.json", judge.beats.state)
    judge.after(10, (0, 5), (1, 4), (2, 5))
    assert judge.beats.state()["behind"] == []  # somebody is always a little behind
    for count in (1, 2):
        judge.after(5, (0, 5), (1, 4), (2, 5))
        writer.write()
        found = json.loads((tmp_path / "heartbeat.json").read_text())
        assert found["beat"] == count and found["world_size"] == found["heard_of"] == 3
    assert [(one["rank"], one["host"], one["seconds"]) for one in found["behind"]] == [(1, "n1", 15.0)]
    assert os.listdir(tmp_path) == ["heartbeat.json"]
    heartbeats_module._Writer(tmp_path / "gone" / "heartbeat.json", judge.beats.state).write()  # the disk is no matter


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_ends_the_others_which_show_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    """With real processes and connections; a rank is stopped by SIGSTOP, as a node that hangs stops it."""
    monkeypatch.setattr(heartbeats_module, "BEAT_SECONDS", 0.5)
    monkeypatch.setattr(watch_module, "GRACE_SECONDS", 0.2)

    def work(watch: Watch, place: Place) -> None:
        pulse = Pulse()
        pulse.move(STEP, "computes", 3)
        Heartbeats(watch, pulse, dict.fromkeys(LIMITS, 4.0)).start()
        (tmp_path / f"rank {place.rank} works").touch()
        wait_for_ever()

    job = start(3, tmp_path, work)
    while len(list(tmp_path.glob("* works"))) < 3:
        time.sleep(0.01)
    os.kill(job.pids[victim], signal.SIGSTOP)
    assert job.finish(stopped=victim) == [-9 if rank == victim else 75 for rank in range(3)]
    outputs = [job.output(rank) for rank in range(3)]
    assert all("in wait_for_ever" in text for rank, text in enumerate(outputs) if rank != victim)
    assert sum(f"rank {victim} on {HOST}: no heartbeat for" in text for text in outputs) == 1
