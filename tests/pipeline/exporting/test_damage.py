"""Damaged exported folders are refused by name and reason, in every place that reads one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import generate
from pipeline.checkpoint.files import seal
from pipeline.config.command_line import load_config
from pipeline.export import main
from pipeline.exported.folder import MANIFEST, with_own_hash
from tests.pipeline.data.test_reader import jpeg
from tests.pipeline.exporting.exported_runs import loaded, make_data, make_run

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported EVLGen, in two files."""
    root = tmp_path_factory.mktemp("damage")
    make_data(root)
    assert main([str(make_run("evlgen", root)), str(root / "out")]) == 0
    (root / "out.jpg").write_bytes(jpeg(1))
    return root / "out"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def flipped(folder: Path) -> None:
    data = bytearray((folder / "language_model" / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / "language_model" / WEIGHTS).write_bytes(data)


def edited_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_tokens": 6', '"num_tokens": 7'))


def edited_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"step": 1', '"step": 2'))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "model.safetensors has .* bytes, openflm.json says"),
        (flipped, "language_model/model.safetensors does not match its SHA-256"),
        (edited_config, "config.json does not match its SHA-256"),
        (edited_manifest, "openflm.json does not match its own SHA-256"),
        (without("tokenizer.json"), "tokenizer.json is missing"),
        (without("vision_tower/model.safetensors"), "vision_tower/model.safetensors is missing"),
        (without("config.json"), "config.json is missing"),
        (without(MANIFEST), "openflm.json is missing"),
    ],
)
def test_what_does_not_match_the_manifest(folder: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=reason) as caught:
        loaded(folder)
    assert str(folder) in str(caught.value) and "export or download the folder again" in str(caught.value)


def test_the_program_says_it_in_one_line(folder: Path, whole: Path, capsys: pytest.CaptureFixture) -> None:
    truncated(folder)
    assert generate.main(["--run", str(folder), str(whole.parent / "out.jpg")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "openflm.json says" in error


def resealed(folder: Path, name: str = WEIGHTS) -> None:
    """A manifest that lists a file as it is now: what somebody wrote who knew how."""
    content = json.loads((folder / MANIFEST).read_text())
    del content["sha256"]
    content["files"][name] = seal(folder / name)
    (folder / MANIFEST).write_bytes(with_own_hash(content))


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], name: str = WEIGHTS) -> None:
    state = load_file(folder / name)
    change(state)
    save_file(state, folder / name, {"format": "pt"})
    resealed(folder, name)


OUTPUT = "net.connector.output.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop(OUTPUT), f"missing {OUTPUT}"),
        (lambda state: state.update(extra=torch.zeros(2)), "unexpected extra"),
        (lambda state: state.update({OUTPUT: state[OUTPUT].T.contiguous()[:3]}), rf"{OUTPUT} has shape \[3, "),
        (lambda state: state.update({OUTPUT: state[OUTPUT].half()}), f"{OUTPUT} in {WEIGHTS} is of dtype F16"),
    ],
)
def test_tensors_that_are_not_the_models(folder: Path, change: Callable, reason: str) -> None:
    changed(folder, change)
    with pytest.raises(ValueError, match=reason):
        loaded(folder)


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
def test_frozen_parts_that_are_not_those_of_training(folder: Path, part: str) -> None:
    def shift(state: dict[str, torch.Tensor]) -> None:
        state[min(state)] += 1

    changed(folder, shift, f"{part}/{WEIGHTS}")
    with pytest.raises(ValueError, match="was trained with frozen weights"):
        loaded(folder)


def test_a_file_that_is_no_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x80\x04pickled" * 9)
    resealed(folder)
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        loaded(folder)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"../outside": {"bytes": 1, "sha256": "0"}}, "a name that is no file of an export"),
        ({"config.json": {"bytes": 1, "sha256": "0"}}, "does not list tokenizer.json"),
        ([], "lists no files"),
    ],
)
def test_manifests_that_no_export_writes(folder: Path, files: object, reason: str) -> None:
    content = json.loads((folder / MANIFEST).read_text()) | {"files": files}
    del content["sha256"]
    (folder / MANIFEST).write_bytes(with_own_hash(content))
    with pytest.raises(ValueError, match=reason):
        load_config(folder)


@pytest.mark.slow
def test_an_index_that_places_tensors_elsewhere(folder: Path, whole: Path, tmp_path: Path) -> None:
    root, out = whole.parent, tmp_path / "several"
    assert main([str(root / "run_evlgen"), str(out), "--file-gb", "3e-5"]) == 0
    index = json.loads((out / f"{WEIGHTS}.index.json").read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    index["weight_map"][OUTPUT] = first if index["weight_map"][OUTPUT] == last else last
    (out / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    resealed(out, f"{WEIGHTS}.index.json")
    with pytest.raises(ValueError, match="index.json places elsewhere"):
        loaded(out)


def test_a_changed_card_is_nobodys_business(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine")
    loaded(folder)


def test_links_to_files_are_read_as_a_cache_of_the_hub_has_them(folder: Path, tmp_path: Path) -> None:
    for path in [one for one in folder.rglob("*") if one.is_file()]:
        blob = tmp_path / "blobs" / path.relative_to(folder)
        blob.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blob)
        path.symlink_to(blob)
    loaded(folder)
