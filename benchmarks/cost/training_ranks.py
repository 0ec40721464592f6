"""Runs the training program on some ranks of this machine and measures each rank from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.drawn.synth import SynthOptions, write_corpora
from data_prep.tokenizer import train_tokenizer
from pipeline.distributed.launching import reserve_port
from pipeline.recording.run_log import LOG_NAME, read_log

REPOSITORY = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Trained:
    """What a run took: bytes at the peak of each rank's memory (VmHWM), seconds of each step."""

    peak_bytes: list[int]
    step_seconds: list[float]


def make_data(folder: Path, image_size: int, samples: int = 512) -> Path:
    """Synthetic scenes with a tokenizer of their captions; a folder for ``--data``."""
    sizes = {"train": samples, "dev": 16, "test": 0}
    write_corpora(folder / "synth", SynthOptions(sizes, image_size=image_size, pair_share=0))
    train_tokenizer([folder / "synth" / "train"], folder / "tokenizer", 400)
    return folder / "synth"


class Run:
    """The training program running on ``ranks`` ranks, one thread each; ``words`` are its options."""

    def __init__(self, words: Sequence[str], ranks: int, output: Path) -> None:
        self._output = output
        listening, variables = reserve_port()
        command = [sys.executable, "pipeline/train.py", *words, "--output", str(output), "--train.log_every", "1"]
        self._ranks = []
        self._peaks = [0] * ranks
        output.parent.mkdir(parents=True, exist_ok=True)
        with listening, open(f"{output}.txt", "wb") as printed:
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
                environment = {**os.environ, **variables, **own}
                if rank:
                    del environment["MASTER_LISTEN_FD"]
                passed = (listening.fileno(),) if rank == 0 else ()
                self._ranks.append(
                    subprocess.Popen(
                        command, cwd=REPOSITORY, env=environment, pass_fds=passed, stdout=printed, stderr=printed
                    )
                )

    def poll(self) -> bool:
        """Note how much memory each rank has had at most so far; whether any of them still runs."""
        for rank, process in enumerate(self._ranks):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            except OSError:
                continue
            if found := re.search(r"VmHWM:\s+(\d+) kB", status):  # gone in a process that has ended
                self._peaks[rank] = max(self._peaks[rank], int(found.group(1)) * 1024)
        return any(process.poll() is None for process in self._ranks)

    def finished(self) -> Trained:
        """What it took, once all ranks have ended.

        Raises:
            RuntimeError: a rank failed; the end of what it printed.
        """
        codes = [process.wait() for process in self._ranks]
        if any(codes):
            printed = Path(f"{self._output}.txt").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"the ranks ended with {codes}: {printed[-2000:]}")
        seconds = [record["step_seconds"] for record in read_log(self._output / LOG_NAME) if record["kind"] == "train"]
        return Trained(self._peaks, seconds)


def train(words: Sequence[str], ranks: int, output: Path) -> Trained:
    """One run from its start to its end."""
    return finish([Run(words, ranks, output)])[0]


def finish(runs: Sequence[Run]) -> list[Trained]:
    """What runs took that are under way at the same time."""
    while any([run.poll() for run in runs]):  # every one is asked
        time.sleep(POLL_SECONDS)
    return [run.finished() for run in runs]
