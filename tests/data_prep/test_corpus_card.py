"""Other programs read what is prepared: Hugging Face's datasets by the corpus folder alone."""

import json

import pytest

from data_prep.__main__ import main
from data_prep.corpus_card import CARD_NAME
from data_prep.filters import Limits, check_image
from data_prep.prepare import fill_split
from data_prep.record import Record, Rejection
from data_prep.shard_writer import SplitWriter
from tests.data_prep.foreign.shards import picture, triples, write_tar


def write(corpus, split, metas=({},), formats=("JPEG",), num_images=1):
    """A split with a record for each of ``metas``, its images in turns of these ``formats``."""
    records = [
        Record(
            f"{split}_{number}",
            tuple(picture(number + 9 * image, formats[number % len(formats)]) for image in range(num_images)),
            (f"caption {number}", "another"),
            meta,
        )
        for number, meta in enumerate(metas)
    ]
    writer = SplitWriter(corpus / split, corpus.name, split, num_images, overwrite=True, samples_per_shard=4)
    return fill_split(writer, [*records, Rejection("http_404", "row 9")], Limits(), 1)


def load(corpus, tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    return datasets.load_dataset(str(corpus), cache_dir=str(tmp_path / "cache"))


@pytest.mark.slow(5)
def test_hugging_face_reads_a_corpus_by_its_folder(tmp_path):
    """Finding E7: sidecar files, several splits, several image formats, JSON that differs from sample to sample."""
    metas = [{"license": None}] * 6 + [{"license": "cc", "boxes": [1, 2]}] * 3
    write(tmp_path / "c", "train", metas, ("JPEG", "PNG"))
    write(tmp_path / "c", "dev-2", [{"other": 3}] * 2)
    found = load(tmp_path / "c", tmp_path)
    assert {name: len(split) for name, split in found.items()} == {"train": 9, "dev_2": 2}
    for number, sample in enumerate(found["train"]):
        assert sample["__key__"] == f"train_{number}" and sample["txt"] == f"caption {number}"
        assert sample["json"] == {**metas[number], "captions": [f"caption {number}", "another"]}
        image = sample["png" if number % 2 else "jpg"]
        assert image.size == (32, 24) and sample["jpg" if number % 2 else "png"] is None


@pytest.mark.slow(5)
def test_hugging_face_reads_pairs_and_shards_of_others(tmp_path):
    write(tmp_path / "pairs", "train", [{"label": "True"}] * 2, num_images=2)
    (sample, _) = load(tmp_path / "pairs", tmp_path)["train"]
    assert sample["0.jpg"].size == sample["1.jpg"].size == (32, 24) and sample["json"]["label"] == "True"
    members = [("x.JPG", picture(5)), *triples(range(2)), ("9.json", b'{"other": [1]}'), *triples([2])]
    write_tar(tmp_path / "in" / "0.tar", members)
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "taken"), "--workers", "1"]
    assert main(["webdataset", *arguments]) == 0
    texts = load(tmp_path / "taken", tmp_path)["train"]["txt"]  # every sample of the tars, kept or not
    assert list(texts) == [None, "caption 0", "caption 1", None, "caption 2"]


def test_a_readme_of_the_users_own_is_left_alone(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / CARD_NAME).write_text("my notes")
    write(tmp_path / "c", "train")
    assert (tmp_path / "c" / CARD_NAME).read_text() == "my notes"


def test_the_card_names_finished_splits_and_follows_them(tmp_path):
    write(tmp_path / "c", "train")
    first = (tmp_path / "c" / CARD_NAME).read_text()
    assert '"train/*.tar"' in first and "dev" not in first
    (tmp_path / "c" / ".half").mkdir()
    (tmp_path / "c" / ".half" / "manifest.json").write_text("{}")
    (tmp_path / "c" / "damaged").mkdir()
    (tmp_path / "c" / "damaged" / "manifest.json").write_text("{}")
    write(tmp_path / "c", "dev", formats=("WEBP",))
    second = (tmp_path / "c" / CARD_NAME).read_text()
    assert '"train/*.tar"' in second and '"dev/*.tar"' in second and '"webp"' in second
    assert "half" not in second and "damaged" not in second
    write(tmp_path / "c", "train")
    assert (tmp_path / "c" / CARD_NAME).read_text() == second


@pytest.mark.parametrize("image_format, begin", [("jpg", b"\xff\xd8\xff"), ("png", b"\x89PNG")])
def test_all_images_in_one_format(image_format, begin):
    """Finding E7: for readers that can't take several."""
    limits = Limits(image_format=image_format)
    for given in ("JPEG", "PNG", "WEBP", "GIF"):
        content, extension = check_image(picture(1, given), limits)
        assert extension == image_format and content.startswith(begin)
    same = picture(1, {"jpg": "JPEG", "png": "PNG"}[image_format])
    assert check_image(same, limits)[0] is same


def test_the_option_for_one_image_format(tmp_path):
    members = [("1.png", picture(1, "PNG")), ("1.txt", b"one"), ("2.webp", picture(2, "WEBP")), ("2.txt", b"two")]
    write_tar(tmp_path / "in" / "0.tar", members)
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "c"), "--workers", "1", "--copy"]
    assert main(["webdataset", *arguments, "--image-format", "jpg"]) == 0
    manifest = json.loads((tmp_path / "c" / "train" / "manifest.json").read_text())
    assert manifest["provenance"]["members"] == ["jpg", "json", "txt"]
