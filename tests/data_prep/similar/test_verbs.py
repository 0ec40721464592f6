"""hashes, decontaminate and dedupe as a user runs them, on drawn photographs."""

import io
import json
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.checks.measure import measure_split
from data_prep.checks.verify import verify_split
from data_prep.filters import REASONS, Limits
from data_prep.manifest import Shard, file_sha256, find_splits, index_columns, read_manifest, write_manifest
from data_prep.similar import hash_files
from data_prep.similar.hash_files import FOLDER, open_hashes
from data_prep.similar.pictures import VERSION
from pipeline.data.shard_reader import open_corpora
from tests.data_prep.foreign.shards import triples, write_tar
from tests.data_prep.similar.photos import cropped, jpeg, photo, write_split

FAST = ["--workers", "1"]


def run(capsys, *arguments):
    code = main([str(one) for one in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def members(split_dir):
    """Name -> content of every member, by Python's own reader."""
    found = {}
    for path in sorted(split_dir.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def rejected(split_dir):
    lines = (split_dir / "rejected.jsonl").read_text().splitlines()
    return {line["name"]: line for line in map(json.loads, lines)}


def keys(split_dir):
    return sorted({name.partition(".")[0] for name in members(split_dir)})


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A training split that holds images 0 to 3 of the test split of another corpus, changed, and a mirrored one."""
    root = tmp_path_factory.mktemp("data")
    held = {f"h{seed}": jpeg(photo(seed)) for seed in range(6)}
    train = {f"t{seed}": jpeg(photo(seed)) for seed in range(100, 108)}
    train["copied"] = held["h0"]
    train["smaller"] = jpeg(photo(1).resize((200, 150)), 50)
    train["cut"] = jpeg(cropped(photo(2), left=0.05, top=0.02))
    train["grey"] = jpeg(photo(3).convert("L"), 70)
    train["mirrored"] = jpeg(photo(4).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    write_split(root / "web" / "train", {key: train[key] for key in sorted(train, key=lambda key: key[::-1])})
    write_split(root / "shown" / "test", held)
    return root


def test_hashes_lie_beside_and_change_nothing(corpora, capsys, tmp_path):
    split = shutil.copytree(corpora / "web" / "train", tmp_path / "web" / "train")
    before = {path.name: path.read_bytes() for path in split.iterdir() if path.is_file()}
    fingerprint = read_manifest(split).fingerprint()
    code, out, _ = run(capsys, "hashes", tmp_path, *FAST)
    assert code == 0 and "13 images hashed; without a hash: 0" in out
    assert {path.name: path.read_bytes() for path in split.iterdir() if path.is_file()} == before
    assert read_manifest(split).fingerprint() == fingerprint
    assert find_splits(tmp_path, "train") == [split] and not verify_split(split, Limits(), 1).problems
    found = open_hashes(split / FOLDER)
    assert found.hashes.dtype == np.uint64 and found.about.fingerprint == fingerprint
    assert set(found.about.versions) >= {"numpy", "pillow", "jpg"}  # imagehash: values vary with versions
    assert [found.key(row) for row in range(13)] == list(dict.fromkeys(name.split(".")[0] for name in members(split)))


def test_stale_hashes_are_made_anew(corpora, capsys, tmp_path, monkeypatch):
    split = shutil.copytree(corpora / "web" / "train", tmp_path / "web" / "train")
    run(capsys, "hashes", split, *FAST)
    made = (split / FOLDER).stat().st_ino
    run(capsys, "hashes", split, *FAST)
    assert (split / FOLDER).stat().st_ino == made
    about = json.loads((split / FOLDER / "about.json").read_text())
    for change in ({"fingerprint": "of another"}, {"versions": {"pillow": "1.0"}}, {"hash_version": 0}):
        (split / FOLDER / "about.json").write_text(json.dumps(about | change))
        run(capsys, "hashes", split, *FAST)
        assert json.loads((split / FOLDER / "about.json").read_text()) == about, change


@pytest.mark.slow(5)
def test_decontaminated_split(corpora, capsys, tmp_path):
    source = corpora / "web" / "train"
    code, out, _ = run(
        capsys, "decontaminate", source, "--against", corpora / "shown" / "test", "--output", tmp_path / "clean", *FAST
    )
    assert code == 0 and "4 of 13 samples contaminated" in out
    clean = tmp_path / "clean" / "web" / "train"
    assert keys(clean) == ["mirrored", *(f"t{seed}" for seed in range(100, 108))]
    before, after = members(source), members(clean)
    assert after == {name: content for name, content in before.items() if name.partition(".")[0] in keys(clean)}
    assert not verify_split(clean, Limits(), 1).problems
    found = rejected(clean)
    assert {key: line["reason"] for key, line in found.items()} == {
        "copied": "held_out_copy",
        "smaller": "near_held_out",
        "cut": "near_held_out",
        "grey": "near_held_out",
    }
    assert "shown/test h0" in found["copied"]["detail"] and "shown/test h2" in found["cut"]["detail"]
    assert all(line["rows"] == 2 and line["reason"] in REASONS for line in found.values())
    manifest, original = read_manifest(clean), read_manifest(source)
    assert manifest.rows + sum(manifest.rejected.values()) == original.rows
    assert manifest.provenance["made_from"]["fingerprint"] == original.fingerprint()
    assert manifest.provenance["passport"] == measure_split(clean, manifest, 1).as_json()
    assert "web" in (clean.parent / "README.md").read_text(), "other programs find it too"
    against = manifest.provenance["arguments"]["against"][0]
    assert against == {"name": "shown/test", "fingerprint": read_manifest(corpora / "shown" / "test").fingerprint()}


@pytest.mark.slow(3)
def test_either_of_two_copies_may_be_the_one_cut_on_all_sides(capsys, tmp_path):
    """Of 200 photographs 178 were found where the held-out one was cut: its hash guessed what was cut off. Here no
    guess is right: another photograph lies over what is cut off."""
    whole, cut = {}, {}
    for seed in range(50):
        shown = cropped(photo(seed), 0.05, 0.05, 0.05, 0.05)
        around = Image.blend(photo(seed), photo(1000 + seed), 0.5)
        around.paste(shown, (round(0.05 * around.width), round(0.05 * around.height)))
        whole[f"p{seed:02}"] = jpeg(around if seed < 40 else around.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        cut[f"p{seed:02}"] = jpeg(shown, 75)
    whole, cut = write_split(tmp_path / "whole" / "train", whole), write_split(tmp_path / "cut" / "test", cut)
    for split, other in ((whole, cut), (cut, whole)):
        code, out, _ = run(capsys, "decontaminate", split, "--against", other, "--report", *FAST)
        assert code == 1 and "40 of 50 samples contaminated" in out
        code, out, _ = run(capsys, "decontaminate", split, "--against", other, "--report", "--mirror", *FAST)
        assert code == 1 and "50 of 50 samples contaminated" in out


@pytest.mark.slow(5)
def test_workers_change_no_byte(corpora, capsys, tmp_path):
    for workers in (1, 2):
        options = ["--output", tmp_path / str(workers), "--workers", workers, "--mirror"]
        code, out, err = run(
            capsys, "decontaminate", corpora / "web" / "train", "--against", corpora / "shown" / "test", *options
        )
        assert code == 0 and "5 of 13 samples" in out, err
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*/*/*")} for name in "12")
    assert one == two


@pytest.mark.slow(3)
def test_report_lists_and_draws_and_ends_with_1(corpora, capsys, tmp_path):
    sheet = tmp_path / "pairs.html"
    code, out, _ = run(
        capsys,
        *("decontaminate", corpora / "web" / "train", "--against", corpora / "shown" / "test"),
        *("--report", "--sheet", sheet, "--max-lines", 2, "--mirror", *FAST),
    )
    assert code == 1 and "5 of 13" in out and "... and 3 more" in out
    page = sheet.read_text()
    assert page.count("<img") == 10 and "web/train mirrored" in page and "mirrored</p>" in page
    clean = write_split(tmp_path / "other" / "train", {"a": jpeg(photo(200)), "b": jpeg(photo(201))})
    code, out, _ = run(capsys, "decontaminate", clean, "--against", corpora / "shown" / "test", "--report", *FAST)
    assert code == 0 and "0 of 2" in out


@pytest.mark.slow(3)
def test_exported_hashes_serve_without_the_images(corpora, capsys, tmp_path):
    held = shutil.copytree(corpora / "shown", tmp_path / "shown")
    code, out, _ = run(capsys, "hashes", held / "test", "--export", tmp_path / "exported", *FAST)
    shutil.rmtree(held)
    sheet = tmp_path / "pairs.html"
    code, out, _ = run(
        capsys, "decontaminate", corpora / "web" / "train", "--against", tmp_path / "exported", "--report", *FAST,
        "--sheet", sheet,
    )  # fmt: skip
    assert code == 1 and "4 of 13" in out and sheet.read_text().count("<img") == 8
    about = tmp_path / "exported" / "shown_test" / "about.json"
    about.write_text(about.read_text().replace(f'"pillow": "{hash_files.versions()["pillow"]}"', '"pillow": "1.0"'))
    code, out, _ = run(capsys, "decontaminate", corpora / "web" / "train", "--against", about.parent, "--report", *FAST)
    assert code == 1 and "'pillow': '1.0'" in out
    about.write_text(json.dumps(json.loads(about.read_text()) | {"hash_version": 0}))
    code, _, err = run(capsys, "decontaminate", corpora / "web" / "train", "--against", about.parent, "--report", *FAST)
    assert code == 2 and err.count("\n") == 1 and f"version 0, this program makes {VERSION}" in err


@pytest.mark.slow(3)
def test_images_of_pairs_are_hashed_each(corpora, capsys, tmp_path):
    pairs = {f"p{seed}": (jpeg(photo(300 + seed)), jpeg(photo(400 + seed))) for seed in range(3)}
    pairs["bad"] = (jpeg(photo(500)), jpeg(photo(1), 40))
    pairs_split = write_split(tmp_path / "pairs" / "train", pairs)
    code, out, _ = run(
        capsys, "decontaminate", pairs_split, "--against", corpora / "shown" / "test", "--output", tmp_path, *FAST,
        "--overwrite",
    )  # fmt: skip
    assert code == 0 and "1 of 4 samples" in out and keys(pairs_split) == ["p0", "p1", "p2"]
    held = write_split(tmp_path / "held" / "dev", {"pair": (jpeg(photo(600)), jpeg(photo(101), 60))})
    code, out, _ = run(capsys, "decontaminate", corpora / "web" / "train", "--against", held, "--report", *FAST)
    assert code == 1 and "t101: near_held_out: like held/dev pair" in out


def test_what_cannot_be_asked_is_one_line(corpora, capsys, tmp_path):
    train, held = corpora / "web" / "train", corpora / "shown" / "test"
    for wrong, said in (
        ([train, "--against", held], "--output FOLDER"),
        ([train, "--against", held, "--report", "--output", tmp_path], "--output FOLDER"),
        ([train, "--against", train, "--report"], "name other splits"),
        ([train, "--against", tmp_path, "--report"], "neither a prepared split nor a folder of hashes"),
        ([train, train, "--against", held, "--output", tmp_path], "one at a time"),
    ):
        code, _, err = run(capsys, "decontaminate", *wrong, *FAST)
        assert code == 2 and err.count("\n") == 1 and said in err, wrong
    held_alone = {"copied": members(train)["copied.jpg"]}
    only = write_split(tmp_path / "only" / "train", held_alone)
    code, _, err = run(capsys, "decontaminate", only, "--against", held, "--output", tmp_path / "none", *FAST)
    assert code == 2 and "no sample of" in err and not (tmp_path / "none" / "only" / "train").exists()
    assert not list((tmp_path / "none").glob("*/.*"))


@pytest.fixture
def repeated(tmp_path):
    first = {
        "b": jpeg(photo(1)),
        "a": jpeg(photo(1), 60),  # stays: the least key
        "z": jpeg(photo(2)),
    }
    second = {
        "c": jpeg(photo(3)),
        "again": jpeg(photo(2).resize((200, 150))),
        "same": first["z"],
        "d": jpeg(photo(4)),
        "flat1": jpeg(Image.new("RGB", (99, 99), "red")),
        "flat2": jpeg(Image.new("RGB", (99, 99), "red")),
        "flat3": jpeg(Image.new("RGB", (80, 80), "red")),
    }
    write_split(tmp_path / "one" / "train", first)
    write_split(tmp_path / "two" / "train", second)
    return tmp_path


@pytest.mark.slow(3)
@pytest.mark.parametrize("workers", [1, 2])
def test_duplicates_within_and_across_corpora(repeated, capsys, workers):
    """The first corpus has its images, in it the least key; flat images are the same by their bytes alone."""
    code, out, _ = run(
        capsys, "dedupe", repeated / "one" / "train", repeated / "two" / "train", "--output", repeated / "new",
        "--workers", workers,
    )  # fmt: skip
    one, two = (repeated / "new" / name / "train" for name in ("one", "two"))
    assert code == 0 and keys(one) == ["a", "z"] and keys(two) == ["c", "d", "flat1", "flat3"]
    found = rejected(one) | rejected(two)
    assert {key: line["reason"] for key, line in found.items()} == {
        "b": "near_duplicate_image",
        "again": "near_duplicate_image",
        "same": "duplicate_image",
        "flat2": "duplicate_image",
    }
    assert found["b"]["detail"] == "like one/train a" and found["same"]["detail"] == "the bytes of one/train z"
    assert not verify_split(one, Limits(), 1).problems and not verify_split(two, Limits(), 1).problems


@pytest.mark.slow(3)
def test_the_order_of_corpora_says_which_stays(repeated, capsys):
    code, out, _ = run(
        capsys, "dedupe", repeated / "two" / "train", repeated / "one" / "train", "--output", repeated / "new", *FAST
    )
    assert keys(repeated / "new" / "two" / "train") == ["again", "c", "d", "flat1", "flat3"]
    assert keys(repeated / "new" / "one" / "train") == ["a"]


@pytest.mark.slow(3)
def test_duplicates_by_bytes_alone_and_mirrored_ones(repeated, capsys, tmp_path):
    one, two = repeated / "one" / "train", repeated / "two" / "train"
    code, out, _ = run(capsys, "dedupe", one, two, "--exact", "--report", *FAST)
    assert code == 1 and "0 of 3" in out and "2 of 7" in out
    turned = {"m": jpeg(photo(2).transpose(Image.Transpose.FLIP_LEFT_RIGHT)), "n": jpeg(photo(9))}
    third = write_split(tmp_path / "three" / "train", turned)
    assert run(capsys, "dedupe", one, third, "--report", *FAST)[1].count("0 of 2 samples") == 1
    assert (
        "m: near_duplicate_image: like one/train z"
        in run(capsys, "dedupe", one, third, "--report", "--mirror", *FAST)[1]
    )


@pytest.mark.slow(3)
def test_an_unavailable_picture_is_named_and_dropped(capsys, tmp_path):
    """openimages: a picture that many addresses give counts as success."""
    missing = jpeg(Image.new("RGB", (60, 40), "grey"))
    images = {f"lost{number}": missing for number in range(5)} | {"x": jpeg(photo(1)), "y": jpeg(photo(1))}
    split = write_split(tmp_path / "web" / "train", images)
    code, out, _ = run(capsys, "hashes", split, *FAST)
    assert "5 times the same image" in out and "such as lost0" in out and "2 times the same image" in out
    code, out, _ = run(capsys, "dedupe", split, "--max-image-repeats", 4, "--output", tmp_path / "new", *FAST)
    clean = tmp_path / "new" / "web" / "train"
    assert code == 0 and keys(clean) == ["x"]
    assert read_manifest(clean).rejected == {"duplicate_image": 2, "repeated_image": 10}


def test_other_members_of_a_shard_are_kept_with_their_sample(corpora, capsys, tmp_path):
    """Shards of other programs hold more than the index names."""
    split = tmp_path / "foreign" / "train"
    split.mkdir(parents=True)
    contents = {"a": jpeg(photo(1), 50), "b": jpeg(photo(700)), "c": jpeg(photo(701))}
    with tarfile.open(split / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for key, image in contents.items():
            for extension, content in (
                ("cls", b"7"),
                ("jpg", image),
                ("txt", key.encode()),
                ("json", b"{}"),
                ("x", b"y"),
            ):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size, member.pax_headers = len(content), {"mtime": "1.5"}
                tar.addfile(member, io.BytesIO(content))
    fields, rows = ("image", "text", "meta"), []
    columns = index_columns(fields)
    with tarfile.open(split / "0.tar") as tar:
        places = {member.name: member for member in tar}
    for key in contents:
        row = [0] * columns.width
        for name, extension in zip(fields, ("jpg", "txt", "json")):
            row[columns.offset[name]] = places[f"{key}.{extension}"].offset_data
            row[columns.size[name]] = places[f"{key}.{extension}"].size
        rows.append(row)
    np.save(split / "0.index.npy", np.array(rows, np.int64))
    manifest = read_manifest(corpora / "web" / "train")
    hashes = [file_sha256(split / name) for name in ("0.tar", "0.index.npy")]
    shard = Shard("0.tar", "0.index.npy", 3, 3, (split / "0.tar").stat().st_size, *hashes)
    write_manifest(split, replace(manifest, corpus="foreign", shards=(shard,), rejected={}))
    code, out, err = run(
        capsys, "decontaminate", split, "--against", corpora / "shown" / "test", "--output", tmp_path / "new", *FAST
    )
    assert code == 0, err
    copied = tmp_path / "new" / "foreign" / "train"
    found = members(copied)
    assert sorted(found) == sorted(f"{key}.{end}" for key in "bc" for end in ("cls", "jpg", "txt", "json", "x"))
    assert found["c.jpg"] == contents["c"] and found["b.txt"] == b"b"
    [index] = [np.load(path) for path in copied.glob("*.npy")]
    raw = next(copied.glob("*.tar")).read_bytes()
    text = columns.offset["text"]
    assert [raw[row[text] : row[text] + 1] for row in index.tolist()] == [b"b", b"c"]


def test_an_image_that_cannot_be_decoded_is_counted_and_has_no_hash(capsys, tmp_path):
    split = write_split(tmp_path / "web" / "train", {"cut": jpeg(photo(1))[:2000], "good": jpeg(photo(2))})
    code, out, _ = run(capsys, "hashes", split, *FAST)
    assert code == 0 and "without a hash: 1 (flat, two-tone or unreadable, of which unreadable 1)" in out
    found = open_hashes(split / FOLDER)
    assert [int(value) != 0 for value in found.hashes] == [False, True] and found.digests.all()


def test_samples_of_shards_of_another_program_are_named_as_in_training(capsys, tmp_path):
    """Keys repeat from shard to shard there."""
    for name in ("00000", "00001"):
        write_tar(tmp_path / "in" / f"{name}.tar", triples(range(2)))
    assert run(capsys, "webdataset", "--input", tmp_path / "in", "--output", tmp_path / "cc", *FAST)[0] == 0
    assert run(capsys, "hashes", tmp_path / "cc", *FAST)[0] == 0
    hashes, (corpus,) = open_hashes(tmp_path / "cc" / "train" / FOLDER), open_corpora([tmp_path / "cc"], "train")
    assert [hashes.key(row) for row in range(4)] == [corpus.read(row).key for row in range(4)]
    assert len({hashes.key(row) for row in range(4)}) == 4
