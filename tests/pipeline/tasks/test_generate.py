"""Tests of captioning from a run: files, held-out samples, and everything that can be wrong with either."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_prep.tokenizer import train_tokenizer
from model.decode.both_ways import ScoreWeights
from pipeline import generate
from pipeline.data.shard_reader import open_corpora
from pipeline.data.tokenizer import load_tokenizer
from pipeline.evaluate import main as evaluate
from pipeline.generate import main
from pipeline.reporting.page import write_report
from pipeline.tasks.caption_lengths import QUANTILES
from pipeline.tasks.captioning import Captioner, Item, items_of_corpora, load_captioner, write_results
from tests.tiny_corpus import make_corpus
from tests.written_run import TINY, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with prepared data, a tokenizer and the checkpoint of an untrained model; beside it one of mlm."""
    folder = tmp_path_factory.mktemp("generate")
    data = make_corpus(folder / "data", train=40, dev=12, vocabulary_size=300)
    write_run(folder / "mlm", data, TINY + "objective: {{name: mlm}}\n")
    return write_run(folder / "run", data, TINY)


@pytest.fixture(scope="module")
def captioning_run(run: Path) -> Path:
    """A run of the task captioning that reads a prompt and samples."""
    task = "task: {{name: captioning, prompt: a large, decoding: nucleus, temperature: 0.5}}\n"
    return write_run(run.parent / "captioning", run.parent / "data", TINY + task)


@pytest.mark.slow
def test_a_runs_own_search_is_taken_whole_or_not_at_all(run: Path) -> None:
    """Beams that are asked for are not mixed with the penalties that belong to the run's own."""
    task = (
        "task: {{name: captioning, decoding: released_beam, beams: 2, length_penalty: 0.5, repetition_penalty: 1.5}}\n"
    )
    folder = write_run(run.parent / "penalised", run.parent / "data", TINY + task)
    for beams, expected in ((None, (2, "released_beam", 0.5, 1.5)), (3, (3, "beam", 1.0, 1.0))):
        found = load_captioner(folder, torch.device("cpu"), beams=beams)
        assert (found.beams, found.beam_rules, found.length_penalty, found.repetition_penalty) == expected


def test_an_flm_run_may_caption_both_ways(run: Path, image: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--run", str(run), str(image), "--max-tokens", "6"]
    found = []
    for more in (["--beams", "3"], ["--both-ways", "--score-weights", "1", "0", "0"], ["--both-ways"]):
        assert main([*words, *more]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1], "the forward stream alone is beam search"
    assert main([*words, "--both-ways", "--beams", "9", "--score-weights", "0", "1", "1"]) == 0
    assert capsys.readouterr().out != found[0]
    captioner = load_captioner(run, torch.device("cpu"), score_weights=ScoreWeights())
    assert captioner.search == "Both ways, 3 beams, weights 1, 1, 0 (l2r, r2l, reconstruction)"


@pytest.mark.slow
def test_a_pretrained_flm_is_scored_both_ways(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With its own reverse stream and reconstructor; by the same search as its captioner's."""
    monkeypatch.setenv("PATH", "")  # no scores that need Java, which take long
    monkeypatch.delenv("JAVA_HOME", raising=False)
    words = ["--run", str(run), "--task", "captioning", "--samples", "4", "--task.decoding", "both_ways"]
    words += ["--task.r2l_weight", "1", "--task.max_tokens", "6"]
    assert evaluate([*words, "--task.reconstruction_score_weight", "1"]) == 2
    assert "this model of captioning has no reconstructor; use 0" in capsys.readouterr().err
    words += ["--task.reconstruction_weight", "1", "--task.reconstruction_score_weight", "0.5"]
    assert evaluate(words) == 0
    [card] = (run / "evaluations").glob("captioning-*-both_ways/scorecard.json")
    lines = (card.parent / "predictions.jsonl").read_text().splitlines()
    found = {one["key"]: one["caption"] for one in map(json.loads, lines)}
    captioner = load_captioner(run, torch.device("cpu"), None, 6, score_weights=ScoreWeights(1.0, 1.0, 0.5))
    items = list(items_of_corpora(open_corpora([str(run.parent / "data")], "dev"), 12, captioner))
    captions = dict(zip([one.name for one in items], captioner.caption([one.pixels for one in items]), strict=True))
    assert len(found) == 4 and found == {key: captions[key] for key in found}


@pytest.mark.slow
def test_a_captioning_run_that_decodes_both_ways_captions_so(run: Path) -> None:
    task = "task: {{name: captioning, decoding: both_ways, beams: 4, r2l_weight: 1.0, r2l_score_weight: 0.5}}\n"
    folder = write_run(run.parent / "both_ways", run.parent / "data", TINY + task)
    found = load_captioner(folder, torch.device("cpu"))
    assert (found.beams, found.score_weights) == (4, ScoreWeights(1.0, 0.5, 0.0))
    assert load_captioner(folder, torch.device("cpu"), beams=2).score_weights is None


@pytest.mark.slow
def test_a_folder_is_captioned_picture_by_picture(run: Path, image: Path, tmp_path: Path, capsys) -> None:
    """Sorted, with those below, without what is no picture, which is counted."""
    folder = tmp_path / "pictures"
    for name in ("b.png", "a.PNG", "below/c.png", "notes.txt", ".hidden/d.png"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(image, folder / name)
    assert main(["--run", str(run), str(folder), "--max-tokens", "3", "--json"]) == 0
    captured = capsys.readouterr()
    names = [json.loads(line)["file"] for line in captured.out.splitlines()]
    assert names == [str(folder / name) for name in ("a.PNG", "b.png", "below/c.png")]
    assert f"{folder}: 3 files taken, 1 skipped for their endings" in captured.err


@pytest.mark.slow
def test_a_captioning_run_captions_as_its_options_say(
    captioning_run: Path, image: Path, capsys: pytest.CaptureFixture
) -> None:
    captioner = load_captioner(captioning_run, torch.device("cpu"))
    assert captioner.search == "Nucleus sampling, top p 0.9, temperature 0.5, seed 2022"
    assert captioner.tokenizer.decode(captioner.prompt) == "a large" and captioner.num_hidden == len(captioner.prompt)
    assert load_captioner(captioning_run, torch.device("cpu"), beams=1).search == "Greedy search"
    assert main(["--run", str(captioning_run), str(image)]) == 0
    sampled = capsys.readouterr().out
    assert main(["--run", str(captioning_run), str(image), str(image)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == sampled.strip() and second != first, "the number of an image decides what is drawn"
    assert main(["--run", str(captioning_run), str(image), "--beams", "1", "--prompt", "red"]) == 0
    caption = capsys.readouterr().out.strip().split("\t")[1]
    assert caption.startswith("red") and "a large" not in caption, "its own prompt is not shown, the one given is"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (50, 40), "red").save(path)
    return path


def test_caption_files_as_text_and_json(run: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--run", str(run), str(image), str(image)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith(f"{image}\t")
    output = tmp_path / "captions.jsonl"
    assert main(["--run", str(run), str(image), "--json", "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == {"file": str(image), "caption": first.split("\t")[1]}


def test_beams_prompt_and_length(run: Path, image: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--run", str(run), str(image), "--beams", "3", "--max-tokens", "6", "--prompt", "a large"]
    assert main(options) == 0
    caption = capsys.readouterr().out.strip().split("\t")[1]
    assert caption.startswith("a large")
    captioner = load_captioner(run, torch.device("cpu"), max_tokens=10_000)
    assert captioner.max_tokens == 18  # max_text_length without <s> and </s>


@pytest.mark.parametrize("search", [[], ["--nucleus", "0.9", "--seed", "3"], ["--beams", "2"], ["--both-ways"]])
def test_batching_changes_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, search: list[str]) -> None:
    """Invariant 5."""
    files = []
    for number in range(5):
        files.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (40, 40), (50 * number, 20, 200 - 30 * number)).save(files[-1])
    assert main(["--run", str(run), *files, "--batch-size", "5", *search]) == 0
    together = capsys.readouterr().out
    assert main(["--run", str(run), *files, "--batch-size", "2", *search]) == 0
    assert capsys.readouterr().out == together


def test_unusable_files_are_named_and_the_rest_is_captioned(
    run: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Invariant 8."""
    empty, text = tmp_path / "empty.jpg", tmp_path / "text.jpg"
    empty.touch()
    text.write_text("no image")
    bad = [str(empty), str(text), str(tmp_path / "absent.jpg")]
    assert main(["--run", str(run), *bad, str(image)]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert [line.split(": ")[0] for line in err.splitlines()] == [f"skipped {path}" for path in bad]
    assert main(["--run", str(run), *bad]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no usable image"


def test_a_file_name_that_is_no_utf_8_is_captioned_like_the_others(
    run: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    shutil.copy(image, odd)
    absent = os.fsdecode(b"absent\xe9.png")
    assert main(["--run", str(run), odd, absent, str(image)]) == 0
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == [f"{tmp_path}/caf\\xe9.png", str(image)]
    assert "skipped absent" in err and err.count("\n") == 1
    assert main(["--run", str(run), odd, "--json", "--output", str(tmp_path / "out.jsonl")]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["file"] == f"{tmp_path}/caf\\xe9.png"


def test_data_in_a_store_that_is_not_there_is_one_line(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--run", str(run), "--data", "memory://nothing/corpus"]) == 2
    assert "error: memory://nothing/corpus: no such folder" in capsys.readouterr().err


def test_held_out_samples_for_the_report(run: Path, capsys: pytest.CaptureFixture) -> None:
    data = run.parent / "data"
    options = ["--run", str(run), "--data", str(data), "--split", "dev", "--samples", "10", "--shown", "4"]
    assert main(options) == 0
    assert "exact match: " in capsys.readouterr().out
    content = json.loads((run / "samples.json").read_text())
    assert content["summary"]["captions"] == 10 and len(content["samples"]) == 4
    assert set(content["summary"]) == {"captions", "exact_match", "main_colour_and_shape_share"}
    sample = content["samples"][0]
    assert sample["references"] and sample["meta"]["main_colour"]
    assert len({sample["key"] for sample in content["samples"]}) == 4
    assert "data:image/jpeg;base64," in write_report(run).read_text()
    assert main([*options, "--json", "--samples", "1000"]) == 0
    assert json.loads(capsys.readouterr().out)["captions"] == 12  # the whole split, nothing twice


def test_all_captions_in_the_form_of_coco_results(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Each image of the split once, in its order, whatever the batch; the report still shows few."""
    data, found = run.parent / "data", []
    for size in ("5", "32"):
        results = tmp_path / f"results{size}.json"
        options = ["--data", str(data), "--split", "dev", "--shown", "2", "--batch-size", size]
        assert main(["--run", str(run), *options, "--results", str(results), "--output", str(tmp_path / "s.json")]) == 0
        found.append(json.loads(results.read_text()))
    (corpus,) = open_corpora([data], "dev")
    keys = list(dict.fromkeys(corpus.read(row).key for row in range(len(corpus))))
    assert [set(entry) for entry in found[0]] == [{"image_id", "caption"}] * len(keys)
    assert [entry["image_id"] for entry in found[0]] == keys and found[0] == found[1]
    assert len(json.loads((tmp_path / "s.json").read_text())["samples"]) == 2
    capsys.readouterr()
    assert main(["--run", str(run), *options, "--samples", "3", "--results", str(results)]) == 0
    assert len(json.loads(results.read_text())) == 3


def test_results_name_images_as_their_corpus_does_and_none_twice(tmp_path: Path) -> None:
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    items = [Item(f"key{n}", pixels, ["a"], {"image_id": 7 + n} if n < 2 else {}) for n in range(3)]
    captioned = [(item, f"caption {number}") for number, item in enumerate(items)]
    assert write_results(tmp_path / "r.json", captioned) == 3
    assert [one["image_id"] for one in json.loads((tmp_path / "r.json").read_text())] == [7, 8, "key2"]
    with pytest.raises(ValueError, match="image_id 8 is captioned 2 times, expected each image once"):
        write_results(tmp_path / "r.json", [*captioned, captioned[1]])


def test_a_run_keeps_captioning_when_its_data_is_gone(run: Path, image: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    shutil.copytree(run.parent / "data" / "tokenizer", moved / "tokenizer")
    (moved / "config.yaml").write_text(TINY.format(data=tmp_path / "gone"))
    assert main(["--run", str(moved), str(image)]) == 0


@pytest.mark.parametrize(
    ("setting", "other", "named"),
    [
        ("text: {width: 16, heads: 2", "text: {width: 24, heads: 2", "has shape [16], the model's [24]"),
        ("image_size: 32", "image_size: 48", "net.vision.position_embedding has shape [5, 16], the model's [10, 16]"),
        ("tokenizer", "tokenizer", "has shape [300, 16], the model's [290, 16]"),
    ],
)
def test_a_checkpoint_of_another_width_resolution_or_vocabulary_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, setting: str, other: str, named: str
) -> None:
    """In one line that names the first difference, by everything that loads a run's weights without its engine."""
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    (moved / "config.yaml").write_text((run / "config.yaml").read_text().replace(setting, other))
    if setting == "tokenizer":
        train_tokenizer([run.parent / "data" / "synth" / "train"], moved / "tokenizer", 290)
    wanted = "restore the config.yaml and tokenizer it was trained with"
    with pytest.raises(ValueError, match=wanted) as refused:
        load_captioner(moved, torch.device("cpu"))
    assert evaluate(["--run", str(moved)]) == 2
    for said in (str(refused.value), capsys.readouterr().err.removesuffix("\n")):
        assert wanted in said and named in said and "\n" not in said


def test_mlm_tries_the_lengths_of_its_training_captions(run: Path, image: Path, capsys: pytest.CaptureFixture) -> None:
    """All captions of the split are read here, so the quantiles are theirs."""
    mlm, data = run.parent / "mlm", run.parent / "data"
    tokenizer = load_tokenizer(data / "tokenizer")
    (corpus,) = open_corpora([data], "train")
    counts = sorted(len(tokenizer.encode(corpus.read_text(row), 20)) - 2 for row in range(len(corpus)))
    wanted = sorted({counts[round(share * (len(counts) - 1))] for share in QUANTILES})
    captioner = load_captioner(mlm, torch.device("cpu"))
    assert captioner.lengths == wanted and len(wanted) > 1
    shorter = load_captioner(mlm, torch.device("cpu"), max_tokens=wanted[1] - 1)
    assert shorter.lengths == sorted({min(length, wanted[1] - 1) for length in wanted})
    assert main(["--run", str(mlm), str(image)]) == 0
    assert capsys.readouterr().out.startswith(f"{image}\t")
    assert main(["--run", str(mlm), "--data", str(data), "--samples", "3", "--lengths", "7", "4", "7"]) == 0
    assert "Mask-predict, 10 iterations, lengths 4, 7, 3 images of" in capsys.readouterr().out


def test_mlm_without_its_data_asks_for_lengths(
    run: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run.parent / "mlm", moved)
    shutil.copytree(run.parent / "data" / "tokenizer", moved / "tokenizer")
    (moved / "config.yaml").write_text((TINY + "objective: {{name: mlm}}\n").format(data=tmp_path / "gone"))
    assert main(["--run", str(moved), str(image)]) == 2
    error = capsys.readouterr().err
    assert "gone" in error and "give --lengths" in error and error.count("\n") == 1
    assert main(["--run", str(moved), str(image), "--lengths", "5"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "RUN"], "give image files or --data DIR"),
        (["--run", "RUN", "IMAGE", "--data", "DATA"], "give image files or --data DIR"),
        (["--run", "ABSENT", "IMAGE"], "no valid checkpoint"),
        (["--run", "RUN", "--data", "DATA", "--split", "nosuch"], "nosuch"),
        (["--run", "RUN", "IMAGE", "--max-tokens", "1", "--prompt", "a large red circle"], "max_tokens"),
        (["--run", "RUN", "IMAGE", "--device", "nosuch"], "nosuch"),
        (["--run", "OTHER", "IMAGE"], "it belongs to another model"),
        (["--run", "RUN", "IMAGE", "--lengths", "5"], "--lengths is for mlm models"),
        (["--run", "MLM", "IMAGE", "--lengths", "5", "19"], "--lengths 5 19: expected numbers of tokens from 1 to 18"),
        (["--run", "MLM", "IMAGE", "--beams", "2"], "no --beams, no --nucleus and no --prompt"),
        (["--run", "MLM", "IMAGE", "--prompt", "a"], "no --beams, no --nucleus and no --prompt"),
        (["--run", "RUN", "IMAGE", "--beams", "2", "--nucleus", "0.5"], "--beams and --nucleus"),
        (["--run", "RUN", "IMAGE", "--results", "x.json"], "--results is for --data DIR"),
        (["--run", "RUN", "IMAGE", "--temperature", "2"], "are for --nucleus TOP_P"),
        (["--run", "RUN", "IMAGE", "--score-weights", "1", "1", "0"], "--score-weights is for --both-ways"),
        (["--run", "RUN", "IMAGE", "--both-ways", "--nucleus", "0.5"], "--both-ways and --nucleus"),
        (["--run", "MLM", "IMAGE", "--both-ways"], "nor --both-ways"),
        (["--run", "CAPTIONING", "IMAGE", "--both-ways"], "needs the r2l stream of FLM, this model of captioning has"),
    ],
)
def test_mistakes_are_one_line(
    run: Path,
    captioning_run: Path,
    image: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
) -> None:
    other = tmp_path / "other"
    if "OTHER" in arguments:
        shutil.copytree(run, other)
        config = (run / "config.yaml").read_text()
        (other / "config.yaml").write_text(config.replace("bottom_layers: 1", "bottom_layers: 2"))
    places = {"RUN": run, "IMAGE": image, "DATA": run.parent / "data", "ABSENT": tmp_path / "absent", "OTHER": other}
    places |= {"MLM": run.parent / "mlm", "CAPTIONING": captioning_run}
    assert main([str(places.get(word, word)) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_told_to_stop_it_ends_between_batches_with_whole_lines(
    run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    caption = Captioner.caption

    def interrupted(self: Captioner, images: list, first: int) -> list[str]:
        os.kill(os.getpid(), getattr(signal, name))
        return caption(self, images, first)

    monkeypatch.setattr(Captioner, "caption", interrupted)
    output = tmp_path / "captions"
    options = ["--run", str(run), *[str(image)] * 5, "--batch-size", "2", "--output", str(output)]
    assert main(options) == 75
    assert [line.split("\t")[0] for line in output.read_text().splitlines()] == [str(image)] * 2
    samples = tmp_path / "samples.json"
    split = ["--data", str(run.parent / "data"), "--batch-size", "2", "--output", str(samples)]
    assert main(["--run", str(run), *split]) == 75 and not samples.exists()


def test_told_to_stop_while_it_loads_it_ends_at_once(
    run: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(generate, "load_captioner", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["--run", str(run), str(image)]) == 75 and "told to stop by SIGTERM" in capsys.readouterr().err
