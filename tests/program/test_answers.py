"""EVLGen answers questions through the programs: zero-shot and trained, on one rank and two, killed and resumed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_prep.shard_writer import SplitWriter
from pipeline import evaluate
from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.reading import Reader
from pipeline.plan import main as plan
from pipeline.recording.run_log import LOG_NAME, read_log
from tests.data_prep.annotations.prepared import prepare
from tests.data_prep.annotations.test_nocaps import DOMAINS, content
from tests.data_prep.annotations.test_nocaps import words as nocaps
from tests.forked_program import start_program
from tests.forked_ranks import run_ranks
from tests.pipeline.data.test_reader import records, write_split
from tests.pipeline.finetuning.test_answers import gqa_record
from tests.pipeline.finetuning.test_classification import vqa_record
from tests.pipeline.scoring.program import die_after, results
from tests.program.test_evlgen import losses, options
from tests.program.test_frozen_tower import zero
from tests.program.test_incidents import train
from tests.tiny_frozen_parts import write_clip, write_language_model

pytestmark = pytest.mark.slow
KILLED = -9
SEARCH = {"name": "released_beam", "beams": 3, "length_penalty": 0.0}
BEAMS = ["--task.decoding", "released_beam", "--task.beams", "3", "--task.length_penalty", "0"]


def write_questions(split_dir: Path, made: Any, count: int) -> None:
    with SplitWriter(split_dir, split_dir.parent.name, split_dir.name, texts="questions") as writer:
        for number in range(count):
            writer.add(made(number))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions and two sets of questions beside each other, and a run that was pretrained on the captions."""
    work = tmp_path_factory.mktemp("work")
    for split in ("train", "dev"):
        write_split(work / "data" / "toy" / split, records(16))
        write_questions(work / "data" / "vqa" / split, vqa_record, 12)
    write_questions(work / "data" / "gqa" / "test_dev", gqa_record, 7)
    write_clip(work / "clip.safetensors")
    write_language_model(work / "llm", "opt")
    assert run_ranks(1, train, options(work, work / "run", *READING, "--train.steps", 2)) == [0]
    return work


READING = ["--data.max_text_length", 56]


def evaluated(work: Path, run: Path, output: Path, world: int, *more: Any, dying: Any = None, code: int = 0) -> dict:
    words = ["--run", run, "--output", output, "--batch-size", 2, *more]
    job = start_program(world, list(map(str, words)), output / f"ranks-{world}", evaluate.main, dying)
    codes = job.finish()
    assert codes[-1] == code, job.output(world - 1)
    assert "no examples for the report" not in job.output(0)
    return results(output) if code == 0 else {}


@pytest.mark.slow(40)
def test_a_pretrained_model_is_asked_questions_that_it_never_saw(work: Path, tmp_path: Path) -> None:
    """On two ranks as on one; killed in the middle, it goes on; GQA's results file names each question once."""
    more = ["--task", "gqa", "--data", work / "data", "--split", "test_dev", "--submission", *BEAMS]
    alone = evaluated(work, work / "run", tmp_path / "one", 1, *more)
    assert alone["card"]["task"] == "gqa" and alone["card"]["items"] == 13
    assert alone["card"]["decoding"] == SEARCH
    assert {"accuracy", "accuracy_as_written", "accuracy/structural/verify", "loss"} <= set(alone["card"]["metrics"])
    assert alone["card"]["protocol"]["prompt"] == "that of its language model"
    assert evaluated(work, work / "run", tmp_path / "two", 2, *more) == alone

    killed = tmp_path / "killed"
    evaluated(work, work / "run", killed, 1, *more, dying=partial(die_after, 3, True), code=KILLED)
    assert not list(killed.glob("*/scorecard.json"))
    assert evaluated(work, work / "run", killed, 1, *more) == alone
    (file,) = killed.glob("*/submission.json")
    found = json.loads(file.read_text())
    assert sorted(one["questionId"] for one in found) == sorted(f"{n}0{k}" for n in range(7) for k in range(n % 3 + 1))


@pytest.mark.slow(60)
def test_it_learns_to_answer_and_goes_on(work: Path, tmp_path: Path) -> None:
    """Several questions of an image at once, two ranks at ZeRO-3, stopped and resumed: the losses of a run that was
    not. Only the connector is trained; the evaluation by one rank finds what training found."""
    task = ["--task.name", "vqa", "--data.texts_per_image", 3, "--model.weights", work / "run", "--train.steps", 4]
    task += [*zero(3), *BEAMS, "--train.eval_samples", 8, "--task.max_answer_tokens", 3]
    words = options(work, tmp_path / "whole", *READING, *task, "--train.eval_every", 4)
    assert run_ranks(2, train, words) == [0, 0]
    again = options(work, tmp_path / "again", *READING, *task)
    assert run_ranks(2, train, [*again, "--train.steps", "2"]) == [0, 0]
    assert run_ranks(2, train, again) == [0, 0]
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    path = checkpoint_path(tmp_path / "whole", 4)
    assert all(name.startswith("net.connector.") for name in Reader(path).shapes("weight"))

    last = [one for one in read_log(tmp_path / "whole" / LOG_NAME) if one["kind"] == "eval"][-1]
    found = evaluated(work, tmp_path / "whole", tmp_path / "scored", 1, "--samples", 8)
    metrics = found["card"]["metrics"]
    assert metrics["loss"] == pytest.approx(last["loss"], abs=1e-5) and "vqa_accuracy/yes/no" in metrics
    assert metrics["vqa_accuracy"] == pytest.approx(last["vqa_accuracy"], abs=1e-6)
    lines = [json.loads(line) for line in found["predictions"].splitlines()]
    assert len(lines) == metrics["questions"] and not any(name.startswith("_") for line in lines for name in line)


@pytest.mark.slow(20)
def test_it_captions_a_prepared_set_by_domain(work: Path, tmp_path: Path) -> None:
    """With the limits of the release: beams of 7 to 29 tokens; nocaps as its verb prepares it."""
    assert prepare(*nocaps(tmp_path, content(6))) == 0
    words = ["--task", "captioning", "--data", tmp_path / "data" / "nocaps", "--task.decoding", "released_beam"]
    words += ["--task.beams", 5, "--task.max_tokens", 29, "--task.min_tokens", 7, "--submission"]
    found = evaluated(work, work / "run", tmp_path / "scored", 1, *words)
    assert found["card"]["protocol"]["min_tokens"] == 7 and found["card"]["decoding"]["name"] == "released_beam"
    assert {f"cider_d/{name}" for name in DOMAINS} <= set(found["card"]["metrics"])
    lines = [json.loads(line) for line in found["predictions"].splitlines()]
    assert [line["domain"] for line in lines] == [*DOMAINS, *DOMAINS] and len(lines[0]["references"]) == 10


def test_it_is_planned(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fine-tuning on questions, by its configuration alone."""
    words = options(work, work / "run", *READING, "--task.name", "okvqa")
    del words[words.index("--output") : words.index("--output") + 2]
    assert plan([*words, "--gpus", "2", "--gpu-memory", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["trained"] == 20_384  # as the census says
