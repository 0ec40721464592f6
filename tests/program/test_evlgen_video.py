"""EVLGen of videos through the programs: trained on drawn clips, resumed, evaluated, captioned, planned, refused."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest

from data_prep.drawn.moving_scenes import MovingOptions, write_moving
from data_prep.record import Record
from data_prep.shard_writer import SplitWriter
from pipeline.config.command_line import parse_command_line
from pipeline.dry_run.counting import counted, known_vocabulary, valueless
from pipeline.evaluate import main as evaluate
from pipeline.generate import main as generate
from pipeline.plan import main as plan
from pipeline.recording.run_log import LOG_NAME, read_log
from pipeline.reporting.page import report_or_warn
from tests.forked_ranks import run_ranks
from tests.numbered_clips import clip
from tests.pipeline.data.test_reader import jpeg, records, write_split
from tests.program.test_evlgen import STEPS, losses
from tests.program.test_evlgen import options as options_of_evlgen
from tests.program.test_incidents import train
from tests.tiny_frozen_parts import write_clip, write_language_model

pytestmark = pytest.mark.slow
options = partial(options_of_evlgen, recipe="evlgen_video_tiny")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn clips, a tower and a language model."""
    work = tmp_path_factory.mktemp("work")
    write_moving(work / "data" / "moving", MovingOptions({"train": 40, "dev": 6}, image_size=32, num_frames=8))
    write_clip(work / "clip.safetensors")
    write_language_model(work / "llm")
    return work


@pytest.fixture(scope="module")
def run(work: Path) -> Path:
    assert run_ranks(1, train, options(work, work / "run")) == [0]
    return work / "run"


def test_a_resumed_run_is_the_whole_one_bit_for_bit(work: Path, run: Path, tmp_path: Path) -> None:
    found = losses(run)
    assert len(found) == STEPS and found[-1] < found[0]
    assert run_ranks(1, train, options(work, tmp_path / "resumed", "--train.steps", 4)) == [0]
    assert run_ranks(1, train, options(work, tmp_path / "resumed")) == [0]
    assert losses(tmp_path / "resumed") == found


def test_ranks_and_workers_give_the_same_losses(work: Path, run: Path, tmp_path: Path) -> None:
    assert run_ranks(2, train, options(work, tmp_path / "run", "--data.num_workers", 1)) == [0, 0]
    assert losses(tmp_path / "run") == pytest.approx(losses(run), abs=1e-4)


def test_another_number_of_frames_is_another_run(work: Path, run: Path) -> None:
    with pytest.raises(RuntimeError, match="frames"):
        run_ranks(1, train, options(work, run, "--data.frames", 2, "--train.steps", 8))


@pytest.mark.slow(25)
def test_clips_are_captioned_scored_and_shown(
    work: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Captioning from the pretrained run on two ranks, evaluated by beams; the report shows pictures of a clip."""
    monkeypatch.chdir(tmp_path)
    task = ["--task.name", "captioning", "--task.max_tokens", 8, "--model.weights", run]
    assert run_ranks(2, train, options(work, tmp_path / "captions", *task, "--train.steps", 2)) == [0, 0]
    last = [one for one in read_log(tmp_path / "captions" / LOG_NAME) if one["kind"] == "eval"][-1]
    assert {"cider_d", "loss", "cider_d_wrong_image"} <= set(last)
    assert evaluate(["--run", "captions", "--split", "dev", "--task.decoding", "beam"]) == 0
    [card] = (tmp_path / "captions" / "evaluations").glob("captioning-*/scorecard.json")
    assert json.loads(card.read_text())["metrics"]["caption_loss"] == pytest.approx(last["caption_loss"], abs=1e-5)
    assert json.loads(card.read_text())["protocol"]["frames"] == "4 of each clip, at equal distances"
    lines = [json.loads(line) for line in (card.parent / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(re.search("moves", line["references"][0]) for line in lines)
    shown = json.loads((card.parent / "examples.json").read_text())["examples"]
    assert shown and all(len(one["images"]) == 4 and one["images"][0]["thumbnail"] for one in shown)

    capsys.readouterr()
    assert generate(["--run", "captions", "--data", str(work / "data"), "--split", "dev", "--samples", "3"]) == 0
    assert "3 clips of moving/dev" in capsys.readouterr().out
    samples = json.loads((tmp_path / "captions" / "samples.json").read_text())["samples"]
    assert len(samples) == 3 and all(one["thumbnail"] for one in samples)
    report_or_warn(tmp_path / "captions", None)
    assert "data:image/jpeg" in (tmp_path / "captions" / "report.html").read_text()


def test_video_files_are_captioned(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"a.mp4": clip(8), "b.webm": clip(3, "webm"), "c.jpg": jpeg(1), "d.mp4": clip(8)[:300]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert generate(["--run", str(run), *(str(tmp_path / name) for name in files)]) == 0
    found = capsys.readouterr()
    assert [line.split("\t")[0] for line in found.out.splitlines()] == [str(tmp_path / n) for n in ("a.mp4", "b.webm")]
    assert re.search("c.jpg: not a video .* this run captions clips", found.err)
    assert re.search("d.mp4: (broken video|no video stream)", found.err)


def test_damaged_clips_are_counted(work: Path, tmp_path: Path) -> None:
    """By reason in log.jsonl, by name in unusable.jsonl; the run goes on with the others."""
    write_moving(tmp_path / "data" / "moving", MovingOptions({"train": 14, "dev": 2}, image_size=32, num_frames=8))
    with SplitWriter(tmp_path / "data" / "bad" / "train", "bad", "train", videos=True) as writer:
        for key, content in (("cut", clip(8)[:600]), ("sound", clip(0, sound_seconds=0.5))):
            writer.add(Record(key, (), (f"words of {key}",), {}, ("mp4",), video=content))
    words = ["--data", tmp_path / "data", "--train.steps", 2]
    assert run_ranks(1, train, options(work, tmp_path / "run", *words)) == [0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "unusable.jsonl").read_text().splitlines()]
    assert {(line["key"], line["reason"]) for line in lines} == {("cut", "broken video"), ("sound", "no video stream")}
    assert [one for one in read_log(tmp_path / "run" / LOG_NAME) if one["kind"] == "train"][-1]["bad_samples"] == 2


def test_the_image_model_is_what_videos_start_from(work: Path, tmp_path: Path) -> None:
    """A run on images gives a run on clips its connector; what frames tell each other begins anew."""
    write_split(tmp_path / "images" / "toy" / "train", records(40))
    of_images = [
        "--recipe",
        "evlgen_tiny",
        "--data",
        tmp_path / "images",
        "--train.steps",
        2,
        "--data.eval_split",
        "null",
    ]
    assert run_ranks(1, train, options(work, tmp_path / "image_run", *of_images)) == [0]
    words = ["--model.weights", tmp_path / "image_run", "--train.steps", 2]
    assert run_ranks(1, train, options(work, tmp_path / "video_run", *words)) == [0]
    noted = json.loads((tmp_path / "video_run" / "environment.json").read_text())["starting_weights"]["model"]["names"]
    assert noted["fresh"] and all(".temporal." in name for name in noted["fresh"])


def test_frames_are_counted_by_the_plan(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tower runs for each frame, all that comes behind it once for the clip."""
    words = options(work, work / "unused")
    del words[words.index("--output") : words.index("--output") + 2]
    assert plan([*words, "--gpus", "2", "--gpu-memory", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"]
    works = {}
    for frames in (1, 4):
        config = parse_command_line(options(work, work / "unused", "--data.frames", frames)).config
        objective = valueless(config, known_vocabulary(config)[0], "fp32")
        works[frames] = counted(objective, config, 4, 12.0)
    tower = objective.net.vision.macs
    assert works[4].flops - works[1].flops == 6 * 4 * 3 * tower, "what frames tell each other is trained in the tower"
    assert works[4].image_bytes == 4 * works[1].image_bytes


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--data.frames", "null"], "(a clip per sample, expected 1 image(s)); run"),
        (
            ["--data.features", "float16", "--model.vision.temporal", "null"],
            "data.features float16 can't be with data.frames 4",
        ),
        (["--data.frames", "0"], "data.frames"),
    ],
)
def test_what_does_not_fit_is_one_line(work: Path, tmp_path: Path, more: list[str], error: str) -> None:
    with pytest.raises((RuntimeError, SystemExit), match=re.escape(error)):
        run_ranks(1, train, options(work, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_images_are_refused_where_clips_are_wanted(work: Path, tmp_path: Path) -> None:
    write_split(tmp_path / "images" / "toy" / "train", records(20))
    message = "(1 image(s) per sample, expected a clip); run `python -m data_prep moving`"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run_ranks(1, train, options(work, tmp_path / "run", "--data", tmp_path / "images"))
