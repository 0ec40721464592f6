"""Loader processes that die, hang or lose their data: the run ends with a reason, and nobody waits."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest

from pipeline.data.open_shards import OutOfDescriptors
from pipeline.data.shard_files import LostCorpus
from pipeline.data.shard_reader import Corpus
from pipeline.loading.loader import LoaderError, LoaderOptions
from tests.pipeline.loading.loader_data import HERE, hangs


def dies(self, index):
    os._exit(3)


def breaks(self, index):
    raise ZeroDivisionError("a bug")


@pytest.mark.slow
@pytest.mark.parametrize(
    "reads, message", [(dies, "a loader process died"), (hangs, "no batch within 1 s"), (breaks, None)]
)
def test_workers_that_fail_end_the_run_with_a_reason(data, monkeypatch, reads, message):
    monkeypatch.setattr(Corpus, "read", reads)
    with pytest.raises(LoaderError if message else ZeroDivisionError, match=message or "a bug") as caught:
        next(iter(data.train(options=LoaderOptions(num_workers=2, timeout_seconds=1.0 if reads is hangs else 60.0))))
    if message:
        assert "\n" not in str(caught.value) and "data." in str(caught.value)
        assert "/train/0000" in str(caught.value)  # at which sample: one that kills its process kills the next one too
    del caught
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [LostCorpus, OutOfDescriptors])
def test_data_of_which_nothing_can_be_read_is_told_in_its_own_words(data, monkeypatch, workers, error):
    def cannot(self, index):
        raise error("what is wrong: what to do")

    monkeypatch.setattr(Corpus, "read", cannot)
    with pytest.raises(LoaderError, match="^what is wrong: what to do$"):
        list(data.train(options=LoaderOptions(num_workers=workers)))
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_told_wherever_the_program_is(data):
    loader = data.train(stop=100, options=LoaderOptions(num_workers=2, prefetch=1))
    running = iter(loader)
    next(running)
    with pytest.raises(RuntimeError) as caught:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(60)
    failure = loader.failure(caught.value)
    assert isinstance(failure, LoaderError) and "a loader process died" in str(failure) and "Killed" in str(failure)
    assert loader.failure(ValueError("timed out")) is None
    loader.close()
    running.close()
    assert not multiprocessing.active_children()


def test_a_read_that_hangs_in_the_training_process_ends_it(data, monkeypatch, capfd):
    monkeypatch.setattr(Corpus, "read", hangs)
    child = os.fork()
    if child == 0:
        list(data.train(options=replace(HERE, timeout_seconds=0.3)))
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert "error: no batch within 0.3 s, while reading a/train/0000" in capfd.readouterr().err


@pytest.mark.parametrize("found", ["worker (pid 7) is killed by signal: Killed.", "worker (pid(s) 7, 8) exited"])
def test_the_places_of_all_processes_that_died_are_named(data, found):
    loader = data.train()
    loader._worker_positions.active = lambda corpora: [(7, "a/train/0#1"), (8, "b/train/0#2"), (77, "c/train/0#3")]
    explained = loader._explain(found)
    assert "at a/train/0#1" in explained and ("at b/train/0#2" in explained) == ("8" in found) and "#3" not in explained
