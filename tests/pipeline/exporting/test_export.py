"""Exported folders compute what their runs compute, wherever a run is read; an export is whole or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

import openflm
from model.batch import Row
from model.build import build_objective
from model.decode.stream import decoder_of
from pipeline import generate
from pipeline.evaluate import main as evaluate
from pipeline.export import main
from pipeline.exporting import writing
from pipeline.weights.sources import load_model
from tests.pipeline.data.test_reader import jpeg
from tests.pipeline.exporting.exported_runs import SETTINGS, loaded, make_data, make_run, pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, runs of all kinds (run_KIND) and an exported folder of each (out_KIND)."""
    root = tmp_path_factory.mktemp("export")
    make_data(root)
    for kind in SETTINGS:
        assert main([str(make_run(kind, root)), str(root / f"out_{kind}")]) == 0
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_an_exported_folder_gives_the_logits_of_its_run(folder: Path, kind: str) -> None:
    """Bit for bit, of words after an image or of answers, loaded where the run's frozen files are no longer."""
    config, tokenizer, expected = loaded(folder / f"run_{kind}")
    moved = (folder / f"out_{kind}").rename(folder / "moved")
    try:
        own, other, found = loaded(moved)
    finally:
        moved.rename(folder / f"out_{kind}")
    assert tokenizer.fingerprint == other.fingerprint
    state = found.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())
    images = pixels(3)
    with torch.no_grad():
        if kind == "vqa":
            ids = tokenizer.encode("is it red?", 20)
            rows = [Row(ids, number, 0, "read", str(number)) for number in range(3)]
            tables = [one.judge(one.planner(images, rows))[0] for one in (expected, found)]
        else:
            tables = [decoder_of(one, images).start() for one in (expected, found)]
    assert torch.equal(*tables) and tables[0][tables[0].isfinite()].std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flm", "evlgen"])
def test_captions_of_run_and_export_are_equal(folder: Path, kind: str, capsys: pytest.CaptureFixture) -> None:
    image = folder / "picture.jpg"
    image.write_bytes(jpeg(5))
    printed = []
    for name in (f"run_{kind}", f"out_{kind}"):
        capsys.readouterr()
        assert generate.main(["--run", str(folder / name), "--device", "cpu", "--nucleus", "1", str(image)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and len(printed[0].split("\t")[1]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_openflm_loads_an_exported_folder_as_it_loads_the_run(folder: Path, kind: str) -> None:
    run, exported = (openflm.load(folder / f"{name}_{kind}", device="cpu") for name in ("run", "out"))
    assert run.abilities == exported.abilities and run.name != exported.name
    picture = jpeg(5)
    if "answer" in run.abilities:
        assert run.answer(picture, "is it red?", top=2) == exported.answer(picture, "is it red?", top=2)
    if "caption" in run.abilities:
        assert run.caption(picture) == exported.caption(picture)
    if "match" in run.abilities:
        assert (run.match([picture] * 2, ["red", "a dog"]) == exported.match([picture] * 2, ["red", "a dog"])).all()


@pytest.mark.slow
def test_scores_of_run_and_export_are_equal(folder: Path, tmp_path: Path) -> None:
    found = []
    for name in ("run_vqa", "out_vqa"):
        words = ["--data", str(folder / "questions" / "toy"), "--split", "dev", "--output", str(tmp_path / name)]
        assert evaluate(["--run", str(folder / name), *words]) == 0
        (card,) = (tmp_path / name).glob("*/scorecard.json")
        found.append(json.loads(card.read_text())["metrics"])
    assert found[0] == found[1] and "vqa_accuracy" in found[0]


def test_a_run_starts_from_an_exported_folder(folder: Path) -> None:
    config, tokenizer, expected = loaded(folder / "run_flm")
    torch.manual_seed(1)
    fresh = build_objective(config.model, config.objective, tokenizer.vocabulary, config.data.max_text_length)
    assert not load_model(fresh, str(folder / "out_flm")).fresh
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in expected.state_dict().items())


def test_the_folder_has_the_form_of_the_hub(folder: Path) -> None:
    """Names, metadata, card with front matter; no file says where on this machine anything was."""
    out = folder / "out_evlgen"
    assert sorted(str(one.relative_to(out)) for one in out.rglob("*") if one.is_file()) == [
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "config.json",
        "language_model/config.json",
        "language_model/model.safetensors",
        "model.safetensors",
        "openflm.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vision_tower/config.json",
        "vision_tower/model.safetensors",
        "vision_tower/preprocessor_config.json",
    ]
    for path in out.rglob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
    _, front, card = (out / "README.md").read_text().split("---\n", 2)
    content = yaml.safe_load(front)
    assert (content["license"], content["pipeline_tag"]) == ("unknown", "image-to-text")
    assert "openflm.load" in card and "equal bit for bit" in card
    for path in (*out.rglob("*.json"), out / "README.md"):
        assert str(folder) not in path.read_text(), path


def test_the_card_repeats_scorecards_data_and_licence(folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(folder / "run_ar", tmp_path / "run")
    (run / "evaluations" / "one").mkdir(parents=True)
    score = {"task": "pretraining", "corpora": ["synth"], "split": "dev", "items": 12, "metrics": {"loss": 2.5}}
    score |= {"standard_errors": {"loss": 0.25}, "checkpoint": {"step": 1}}
    (run / "evaluations" / "one" / "scorecard.json").write_text(json.dumps(score))
    other = score | {"metrics": {"cider_d": 9.0}, "checkpoint": {"step": 7}}
    (run / "evaluations" / "two").mkdir()
    (run / "evaluations" / "two" / "scorecard.json").write_text(json.dumps(other))
    assert main([str(run), str(tmp_path / "out"), "--licence", "apache-2.0"]) == 0
    _, front, card = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    content = yaml.safe_load(front)
    assert content["license"] == "apache-2.0" and content["metrics"] == ["loss"]
    assert content["model-index"][0]["results"][0]["metrics"][0]["value"] == 2.5
    assert "| pretraining | synth/dev | 12 | loss | 2.5 ± 0.25 |" in card and "cider_d" not in card


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights_are_those_of_the_run_rounded_once(folder: Path, tmp_path: Path, dtype: str) -> None:
    out, kept = tmp_path / "out", getattr(torch, dtype)
    assert main([str(folder / "run_evlgen"), str(out), "--dtype", dtype]) == 0
    expected, found = loaded(folder / "run_evlgen")[2].state_dict(), loaded(out)[2].state_dict()
    for name, value in expected.items():
        rounded = value.to(kept).to(value.dtype) if value.is_floating_point() else value
        assert torch.equal(found[name], rounded), name
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert {opened.get_tensor(name).dtype for name in opened.keys()} == {kept}
    assert f"rounded to {dtype}" in (out / "README.md").read_text()


@pytest.mark.slow
def test_large_models_are_several_files_with_an_index(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([str(folder / "run_flm"), str(out), "--file-gb", "3e-5"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    expected, found = loaded(folder / "run_flm")[2].state_dict(), loaded(out)[2].state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.slow
def test_frozen_parts_may_stay_where_they_are(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Then they are loaded by their names, and must be those that the run was trained with."""
    out = tmp_path / "out"
    assert main([str(folder / "run_evlgen"), str(out), "--without-frozen"]) == 0
    assert not (out / "vision_tower").exists() and not (out / "language_model").exists()
    expected, found = loaded(folder / "run_evlgen")[2].state_dict(), loaded(out)[2].state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    kept = (folder / "data" / "clip.safetensors").read_bytes()
    from tests.tiny_frozen_parts import write_clip

    write_clip(folder / "data" / "clip.safetensors", seed=3)
    try:
        with pytest.raises(ValueError, match="was trained with frozen weights"):
            loaded(out)
    finally:
        (folder / "data" / "clip.safetensors").write_bytes(kept)


@pytest.mark.slow
def test_where_data_is_gone_pixels_and_words_are_generated(folder: Path, tmp_path: Path) -> None:
    for kind in ("run_flm", "run_vqa"):
        run = shutil.copytree(folder / kind, tmp_path / kind)
        data = folder / ("questions" if kind == "run_vqa" else "data")
        shutil.copytree(data / "tokenizer", run / "tokenizer")
        if kind == "run_vqa":
            shutil.copy(data / "answers.json", run / "answers.json")
        aside = data.rename(folder / "aside")
        try:
            assert main([str(run), str(tmp_path / f"out_{kind}")]) == 0
        finally:
            aside.rename(data)
        assert "4 generated samples" in (tmp_path / f"out_{kind}" / "README.md").read_text()


def test_an_export_that_computes_something_else_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One bit of one weight is enough; nothing is left."""
    honest = writing.trained_tensors

    def off_by_one(objective: torch.nn.Module, dtype: torch.dtype) -> list:
        tensors = honest(objective, dtype)
        number = next(n for n, one in enumerate(tensors) if one.name == "lm_head.bias")
        one = tensors[number]

        def read() -> torch.Tensor:
            value = one.read().clone()
            value[7] += 1e-3
            return value

        tensors[number] = one._replace(read=read)
        return tensors

    monkeypatch.setattr(writing, "trained_tensors", off_by_one)
    assert main([str(folder / "run_flm"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "nothing was exported" in error and "differs by up to" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_interrupted_export_leaves_nothing_that_refuses_the_next(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.part").mkdir()  # of one that was killed
    (tmp_path / "out.part" / "model.safetensors").write_bytes(b"half")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_tokenizer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main([str(folder / "run_ar"), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []
    assert main([str(folder / "run_ar"), str(tmp_path / "out")]) == 0


@pytest.mark.slow
def test_what_is_there_is_replaced_on_request_only(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, words = tmp_path / "out", [str(folder / "run_ar"), str(tmp_path / "out")]
    out.mkdir()
    assert main(words) == 0  # an empty folder is no obstacle
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    (out / "old").write_text("")
    assert main([*words, "--overwrite"]) == 0 and not (out / "old").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert main([words[0], str(tmp_path / "mine"), "--overwrite"]) == 2
    assert "no exported folder" in capsys.readouterr().err and (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere", "out"], "found no valid checkpoint"),
        (["run_flm", "out", "--checkpoint", "7"], "step_00000007"),
        (["out_flm", "out"], "exported folder already"),
        (["run_flm", "out", "--tokenizer", "gpt2"], "--tokenizer is for imported models"),
        (["run_flm", "step_00000003"], "name of a checkpoint"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], reason: str
) -> None:
    assert main([str(folder / words[0]), str(tmp_path / words[1]), *words[2:]]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_pictures_are_read_as_transformers_reads_them(folder: Path) -> None:
    """By preprocessor_config.json, to a grey level: it rounds after the resize, or does not."""
    import numpy as np
    from transformers import AutoImageProcessor

    from pipeline.data.transforms import clip_transform

    processor = AutoImageProcessor.from_pretrained(folder / "out_flm")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 48, 3), dtype=np.uint8))
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    mean, deviation = (torch.tensor(one)[:, None, None] for one in (processor.image_mean, processor.image_std))
    ours = clip_transform(32)(image).float()
    assert ((theirs * deviation + mean) * 255 - ours).abs().max() <= 1.5
