"""Taking in shards of other programs, and reading what came of them."""

from data_prep.__main__ import main
from data_prep.checks.measure import measure_split
from data_prep.checks.verify import verify_split
from data_prep.filters import Limits
from data_prep.manifest import read_manifest
from pipeline.data.shard_reader import Corpus


def take_in(source, output, *options):
    arguments = ["webdataset", "--input", str(source), "--output", str(output), "--workers", "1", *options]
    return main(arguments)


def rows(split_dir):
    """(key, image bytes, caption) of every row, as training reads them."""
    corpus = Corpus(split_dir)
    read = [corpus.read(number) for number in range(len(corpus))]
    return [(sample.key, sample.images[0], sample.text) for sample in read]


def rejected(split_dir):
    return read_manifest(split_dir).rejected


def in_both_ways(source, tmp_path, *options):
    """The rows in place, after checking that copied ones have the same keys, captions and pixels, and both verify."""
    assert take_in(source, tmp_path / "linked", *options) == 0
    assert take_in(source, tmp_path / "copied", "--copy", *options) == 0
    for name in ("linked", "copied"):
        assert verify_split(tmp_path / name / "train", Limits(), 1).problems == []
    linked, copied = (read_manifest(tmp_path / name / "train").provenance["passport"] for name in ("linked", "copied"))
    assert all(linked[name] == copied[name] for name in ("rows", "samples", "images"))
    split_dir = tmp_path / "linked" / "train"
    counted = measure_split(split_dir, read_manifest(split_dir), 1).as_json()
    assert all(linked[name] == counted[name] for name in ("rows", "samples", "images", "caption_words"))
    assert rows(tmp_path / "linked" / "train") == rows(tmp_path / "copied" / "train")
    assert rejected(tmp_path / "linked" / "train") == rejected(tmp_path / "copied" / "train")
    return rows(tmp_path / "linked" / "train")
