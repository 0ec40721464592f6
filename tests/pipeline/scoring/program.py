"""Runs of two tasks and the evaluation program on them, alone or on several ranks, disturbed at will."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.drawn.synth import SynthOptions, write_corpora
from data_prep.tokenizer import train_tokenizer
from pipeline import evaluate
from pipeline.distributed.places import discover
from pipeline.distributed.preempt import StopRequest
from pipeline.scoring.journal import Journal
from tests.forked_program import Job, start_program
from tests.toy_task import ToyTask
from tests.written_run import TINY, write_run

ITEMS, BATCH = 11, 3  # four batches, the last of two
OF_TIME_AND_PLACE = ("seconds", "items_done_before", "world_size", "time", "command")


def make_runs(folder: Path) -> Path:
    """``folder``/toy, a run of the toy task on pairs of images, and ``folder``/run, one that pretrains."""
    sizes = {"train": 30, "dev": 12, "test": 4}
    write_corpora(folder / "data" / "synth", SynthOptions(sizes, image_size=32, pair_share=1))
    train_tokenizer([folder / "data" / "synth" / "train"], folder / "data" / "tokenizer", 300)
    of_data = f"num_workers: 0, tokenizer: {folder / 'data' / 'tokenizer'}, max_text_length"
    settings = TINY.replace("max_text_length", of_data) + f"optim: {{{{micro_batch_size: {BATCH}}}}}\n"
    write_run(folder / "toy", folder / "data" / "synth_pairs", settings, ToyTask())
    write_run(folder / "run", folder / "data" / "synth", settings)
    return folder


def options(folder: Path, name: str, output: Path) -> list[str]:
    return ["--run", str(folder / name), "--samples", str(ITEMS), "--output", str(output)]


def main(name: str, argv: list[str]) -> int:
    """The evaluation program; ``name`` "toy" gives it the toy task."""
    if name != "toy":
        return evaluate.main(argv)
    arguments, words = evaluate._parser().parse_known_args(argv)
    stop = StopRequest().listen(at_once=True)
    try:
        return evaluate.run(arguments, words, discover(os.environ), stop, ToyTask())
    finally:
        stop.close()


def start(
    world: int, folder: Path, name: str, output: Path, prepare: Callable[[int], None] | None = None, *words: str
) -> Job:
    return start_program(
        world, [*options(folder, name, output), *words], output / "ranks", partial(main, name), prepare
    )


def die_after(batches: int, half_a_line: bool, rank: int) -> None:
    """Let this process, the last rank's, kill itself when ``batches`` are written down, and half of one more."""
    if rank == 0 and int(os.environ["WORLD_SIZE"]) > 1:
        return
    left, whole = [batches], Journal.add

    def add(self: Journal, number: int, record: Any) -> Any:
        if not left[0]:
            if half_a_line:
                written = self._stream.tell()
                whole(self, number, record)
                self._stream.truncate((written + self._stream.tell()) // 2)
            os.kill(os.getpid(), 9)
        left[0] -= 1
        return whole(self, number, record)

    Journal.add = add  # type: ignore[method-assign]


def results(output: Path) -> dict[str, Any]:
    """Scorecard without time and place, the text of the predictions, and the names of all files."""
    (folder,) = (path.parent for path in output.glob("*/scorecard.json"))
    card = json.loads((folder / "scorecard.json").read_text())
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    kept = {name: value for name, value in card.items() if name not in OF_TIME_AND_PLACE}
    predictions = folder / "predictions.jsonl"
    return {"card": kept, "predictions": predictions.read_text() if predictions.is_file() else "", "names": names}
