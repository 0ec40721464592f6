"""Features beside the shards are what the tower gives; others, or stale ones, are refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model.vision.tower import build_tower
from pipeline.config.command_line import parse_command_line
from pipeline.config.options import Config, ConfigError
from pipeline.data.shard_reader import Corpus
from pipeline.data.transforms import UnusableSample, clip_transform, decode_image, draft_size
from pipeline.distributed.ranks import Agreement
from pipeline.features import main
from pipeline.stored_features import files
from pipeline.stored_features.files import LostFeatures, ShardWriter, StoredFeatures
from pipeline.stored_features.opening import FeatureSource, feature_source, identity_of, tower_hash
from pipeline.weights.sources import load_vision_tower
from tests.pipeline.data.test_reader import records, write_split
from tests.tiny_frozen_parts import write_clip

SAMPLES = 23


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small shards of training data, a held-out split, a tower, and their features in fp16."""
    work = tmp_path_factory.mktemp("work")
    rows = records(SAMPLES)
    rows[5] = dataclasses.replace(rows[5], captions=("one", "another", "a third"))
    write_split(work / "data" / "toy" / "train", rows, samples_per_shard=9)
    write_split(work / "data" / "toy" / "dev", rows[:4])
    write_clip(work / "clip.safetensors")
    assert main(words(work, "--batch-size", "4")) == 0
    return work


def words(work: Path, *more: str) -> list[str]:
    settings = {"recipe": "flm_tiny", "data": work / "data", "model.vision.pretrained": work / "clip.safetensors"}
    settings |= {"model.vision.frozen": "true"}
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))] + list(more)


def config_of(work: Path, *more: str) -> Config:
    return parse_command_line(words(work, "--data.features", "float16", *more)).config


def opened(work: Path, *more: str, split: str = "train") -> tuple[StoredFeatures, torch.nn.Module, Corpus]:
    config, corpus = config_of(work, *more), Corpus(work / "data" / "toy" / split)
    tower = build_tower(config.model.vision).eval()
    load_vision_tower(tower, config.model)
    source = feature_source(config, SimpleNamespace(net=SimpleNamespace(vision=tower)), Agreement(), [corpus])
    [found] = source.open([corpus])
    return found, tower, corpus


def test_they_are_what_the_tower_gives(written: Path) -> None:
    """Of every row, bit for bit in fp16 where the tower sees the same batch; rows of one image share its features."""
    config = config_of(written)
    for split in ("train", "dev"):
        stored, tower, corpus = opened(written, split=split)
        stored = pickle.loads(pickle.dumps(stored))  # as a loader process has it
        size = config.model.vision.image_size
        transform, draft = clip_transform(size, config.data.fast_decode), draft_size(size, config.data.fast_decode)
        first_rows, start = corpus.first_rows(), 0
        out = torch.empty(1, tower.num_tokens, 2 * tower.width, dtype=torch.uint8)
        for shard in corpus.manifest.shards:
            rows = first_rows[start : start + shard.samples]
            start += shard.samples
            for batch in (rows[number : number + 4] for number in range(0, len(rows), 4)):
                images = [transform(decode_image(corpus.read(int(row)).images[0], draft_size=draft)) for row in batch]
                with torch.no_grad():
                    expected = tower(torch.stack(images)).half()
                for row, tokens in zip(batch, expected, strict=True):
                    stored.read(int(row), out)
                    assert torch.equal(out.view(torch.float16)[0], tokens)
    stored, _, corpus = opened(written)
    of_image = [
        row for row in range(len(corpus)) if corpus.read(row).key == corpus.read(int(corpus.first_rows()[5])).key
    ]
    assert len(of_image) == 3
    copies = []
    for row in of_image:
        stored.read(row, out)
        copies.append(out.clone())
    assert torch.equal(copies[0], copies[1]) and torch.equal(copies[0], copies[2])


def test_started_again_it_goes_on(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is whole stays; a shard that is missing is written; ranks share the shards out."""
    shutil.copytree(written, tmp_path / "work")
    work = tmp_path / "work"
    [folder] = (work / "data" / "toy" / "train").glob("features-*")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == [
        "00000.json",
        "00000.npy",
        "00001.json",
        "00001.npy",
        "00002.json",
        "00002.npy",
        "features.json",
    ]
    for name in ("00001.json", "features.json"):
        (folder / name).unlink()
    kept = (folder / "00000.npy").stat().st_mtime_ns
    assert main(words(work, "--batch-size", "4")) == 0
    assert "2 of 3 shards" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (folder / "00000.npy").stat().st_mtime_ns == kept


def test_an_unusable_image_is_named_when_it_is_read(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "data" / "toy" / "dev", tmp_path / "dev")
    [folder] = (tmp_path / "dev").glob("features-*")
    summary = json.loads((folder / "features.json").read_text())
    summary["shards"][0]["unusable"] = {"2": ["sample-2", "truncated image"]}
    (folder / "features.json").write_text(json.dumps(summary))
    config, corpus = config_of(written), Corpus(tmp_path / "dev")
    tower = build_tower(config.model.vision)
    load_vision_tower(tower, config.model)
    [stored] = FeatureSource(identity_of(config, tower, tower_hash(tower))).open([corpus])
    out = torch.empty(1, tower.num_tokens, 2 * tower.width, dtype=torch.uint8)
    with pytest.raises(UnusableSample, match="sample-2: truncated image"):
        stored.read(int(corpus.first_rows()[2]), out)
    stored.read(int(corpus.first_rows()[1]), out)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--model.vision.image_size", "40"], "no features of this tower beside the shards .those of features-"),
        (["--data.features", "bfloat16"], "no features of this tower beside the shards .those of features-"),
        (["--data.fast_decode", "false"], "no features of this tower beside the shards"),
        (["--model.vision.frozen", "false"], "can't be with model.vision.frozen false: the tower would change"),
        (["--data.augmentation", "randaugment"], "can't be with data.augmentation randaugment"),
        (["--model.vision.temporal", "ordered"], "can't be with model.vision.temporal ordered"),
    ],
)
def test_others_are_refused(written: Path, more: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        opened(written, *more)


def test_those_of_another_tower_or_another_split_are_refused(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "work")
    write_clip(tmp_path / "work" / "clip.safetensors", seed=1)
    with pytest.raises(ConfigError, match="no features of this tower"):
        opened(tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "data" / "toy" / "dev")
    write_split(tmp_path / "work" / "data" / "toy" / "dev", records(3))
    with pytest.raises(ConfigError, match="there are none"):
        opened(tmp_path / "work", split="dev")


def test_numbers_that_do_not_fit_the_dtype_are_refused(written: Path, tmp_path: Path) -> None:
    stored, _, _ = opened(written)
    writer = ShardWriter(tmp_path, 0, 1, stored.identity)
    features = torch.full((1, *stored.identity.shape), 1e5)
    with pytest.raises(ValueError, match="not finite in torch.float16; --data.features bfloat16 has larger ones"):
        writer.write(features, {})
    assert not list(tmp_path.iterdir())
    wide = dataclasses.replace(stored.identity, dtype="bfloat16")
    ShardWriter(tmp_path, 0, 1, wide).write(features, {})
    array = np.load(tmp_path / "00000.npy")
    assert torch.equal(torch.from_numpy(array.view(np.int16)).view(torch.bfloat16), features.bfloat16())


def test_a_damaged_file_is_one_line(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "work")
    [folder] = (tmp_path / "work" / "data" / "toy" / "train").glob("features-*")
    np.save(folder / "00000.npy", np.zeros((2, 2), np.uint16))
    stored, tower, _ = opened(tmp_path / "work")
    out = torch.empty(1, tower.num_tokens, 2 * tower.width, dtype=torch.uint8)
    with pytest.raises(LostFeatures, match=r"00000.npy: holds uint16 \(2, 2\), expected uint16 \(9, 1, 17, 32\)"):
        stored.read(0, out)
    (folder / "00000.npy").write_bytes(b"no array")
    with pytest.raises(LostFeatures, match="00000.npy: .*; write it again"):
        stored.read(0, out)
    whole = (written / folder.relative_to(tmp_path / "work") / "00000.npy").read_bytes()
    (folder / "00000.npy").write_bytes(whole[:-100])
    stored.read(0, out)
    with pytest.raises(LostFeatures, match="00000.npy: ends at byte .*, expected 1088 bytes from"):
        stored.read(int(opened(written)[2].first_rows()[8]), out)
    stored, _, _ = opened(tmp_path / "work")
    (folder / "00000.npy").unlink()
    with pytest.raises(LostFeatures, match="00000.npy.*No such file"):
        stored.read(0, out)


def test_few_files_are_open_at_a_time(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_OPEN", 1)
    stored, tower, corpus = opened(written)
    out = torch.empty(1, tower.num_tokens, 2 * tower.width, dtype=torch.uint8)
    for row in (0, len(corpus) - 1, 0):
        stored.read(row, out)
        assert len(stored._files) == 1


def test_mistakes_of_the_command_line(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*more: Any) -> str:
        assert main(words(written, *map(str, more))) == 2
        return capsys.readouterr().err

    assert "--data.features null: expected float16 or bfloat16" in error("--data.features", "null")
    assert "unknown option --batchsize" in error("--batchsize", 3)
    assert "nowhere" in error("--splits", "nowhere")
