"""The synthetic corpora: deterministic, disjoint splits, captions and answers that are true of the scene."""

import csv
import hashlib
import io
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_prep.checks.info import row_texts
from data_prep.checks.verify import verify_split
from data_prep.drawn.drawing import _RGB, draw_jpeg
from data_prep.drawn.scenes import COLOURS, NUMBERS, OPPOSITE, SHAPES, captions, draw_pair, draw_scene, questions
from data_prep.drawn.synth import SynthOptions, distinct_scenes, write_corpora, write_url_tables
from data_prep.filters import Limits
from data_prep.manifest import open_index, read_manifest
from data_prep.record import PrepError


def digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*.*")}


def metas(split_dir):
    manifest = read_manifest(split_dir)
    for shard in manifest.shards:
        content = (split_dir / shard.file).read_bytes()
        for row in open_index(split_dir, manifest, shard).tolist():
            yield json.loads(content[row[-3] : row[-3] + row[-2]])


def options(train=60, dev=20, test=20, **more):
    return SynthOptions({"train": train, "dev": dev, "test": test}, **more)


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_scenes(tmp_path):
    write_corpora(tmp_path / "a" / "synth", options())
    write_corpora(tmp_path / "b" / "synth", options())
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert {"synth/train/00000.tar", "synth_pairs/dev/manifest.json"} <= set(digests(tmp_path / "a"))
    first, other = distinct_scenes(options()), distinct_scenes(options(seed=1))
    assert first["train"] != other["train"]


@pytest.mark.slow
def test_worker_processes_change_no_byte(tmp_path):
    write_corpora(tmp_path / "a" / "synth", options(train=600, pair_share=0))
    write_corpora(tmp_path / "b" / "synth", options(train=600, pair_share=0, workers=2))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_splits_share_no_scene_and_held_out_ones_do_not_depend_on_the_training_size():
    small, large = distinct_scenes(options(train=10)), distinct_scenes(options(train=2000))
    assert small["dev"] == large["dev"] and small["test"] == large["test"]
    assert small["train"] == large["train"][:10]
    identities = [scene.identity() for scenes in large.values() for scene in scenes]
    assert len(set(identities)) == len(identities) == 2040


def test_captions_are_true_of_the_scene():
    rng = random.Random(0)
    for _ in range(2000):
        scene = draw_scene(rng)
        main, others = scene.things[0], scene.things[1:]
        text = captions(scene, 1)[0]
        assert text.startswith(f"a {main.size} {main.colour} {main.shape} ")
        assert all(main.radius > 1.5 * other.radius for other in others) and 0 <= len(others) <= 3
        found = re.search(r" (above|below|left of|right of) ", text)
        if found:
            relation = found.group(1)
            for other in others:
                dx, dy = other.x - main.x, other.y - main.y
                along = {"above": dy, "below": -dy, "left of": dx, "right of": -dx}[relation]
                across = dx if relation in ("above", "below") else dy
                assert along > 0.3 and (len(others) > 1 or along > 2 * abs(across))
        else:
            assert not others
            expected = {"on the left": main.x < 0.4, "on the right": main.x > 0.6, "in the middle": 0.4 < main.x < 0.6}
            assert [place for place in expected if text.endswith(place)] == [p for p, true in expected.items() if true]
        if scene.layout == "count":
            assert f" {NUMBERS[len(others)]} small {others[0].colour} {others[0].shape}" in text
        if scene.layout == "list":
            left, right = sorted(others, key=lambda thing: thing.x)
            assert text.endswith(f"a {left.words} and a {right.words}")


def test_the_first_caption_is_a_pure_function_and_further_ones_differ():
    scene = draw_scene(random.Random(1))
    five = captions(scene, 5)
    assert len(set(five)) == 5 and captions(scene, 1) == five[:1]
    assert all(scene.main.colour in text and scene.main.shape in text for text in five)


def test_factors_are_balanced():
    scenes = distinct_scenes(options(train=6000))["train"]
    for values, names in (((s.main.colour for s in scenes), COLOURS), ((s.main.shape for s in scenes), SHAPES)):
        counts = Counter(values)
        assert set(counts) == set(names)
        assert max(counts.values()) < 1.2 * min(counts.values())


def test_answers_are_true_and_balanced():
    rng, answers = random.Random(2), Counter()
    for _ in range(1500):
        scene = draw_scene(rng)
        for entry in questions(scene, rng):
            question, answer = entry["question"], entry["answer"]
            if entry["type"] == "colour":
                assert answer == scene.main.colour
            elif entry["type"] == "shape":
                assert answer == scene.main.shape
            elif entry["type"] == "count":
                assert answer == NUMBERS[len(scene.things)]
            elif entry["type"] == "existence":
                colour, shape = re.fullmatch(r"is there an? (\w+) (\w+)\?", question).groups()
                assert (answer == "yes") == any((t.colour, t.shape) == (colour, shape) for t in scene.things)
                answers[answer] += 1
            else:
                asked = next(relation for relation in OPPOSITE if f" {relation} the " in question)
                assert (answer == "yes") == (asked == scene.relation)
                answers[answer] += 1
    assert 0.45 < answers["yes"] / answers.total() < 0.55


def test_pair_statements_are_balanced_within_each_form():
    rng, labels = random.Random(3), {}
    for _ in range(1200):
        _, _, statement, label = draw_pair(rng)
        labels.setdefault(statement.split()[0] + statement.split()[1], Counter())[label] += 1
    for counts in labels.values():
        assert 0.35 < counts[True] / counts.total() < 0.65


def test_the_drawing_shows_the_main_object_in_its_colour():
    rng = random.Random(4)
    for _ in range(50):
        scene = draw_scene(rng)
        pixels = np.asarray(Image.open(io.BytesIO(draw_jpeg(scene, 64))).convert("RGB")).astype(int)
        assert pixels.shape == (64, 64, 3)
        distance = np.abs(pixels - np.array(_RGB[scene.main.colour])).sum(axis=2)
        rows, columns = np.nonzero(distance < 60)
        assert len(rows) > 60  # a medium cross has about 130 pixels
        if len({thing.colour for thing in scene.things}) == len(scene.things):
            assert abs(columns.mean() / 64 - scene.main.x) < 0.06


def test_what_the_json_members_hold(tmp_path):
    write_corpora(tmp_path / "synth", options(captions_per_image=3))
    entries = list(metas(tmp_path / "synth" / "dev"))
    assert len(entries) == 60  # three rows an image
    for meta in entries:
        assert {"main_colour", "main_shape", "captions", "questions", "scene"} <= set(meta)
        assert len(meta["captions"]) == 3 and f"{meta['main_colour']} {meta['main_shape']}" in meta["captions"][0]
    pairs = list(metas(tmp_path / "synth_pairs" / "train"))
    assert len(pairs) == 15 and {meta["label"] for meta in pairs} == {"True", "False"}
    for corpus in ("synth", "synth_pairs"):
        assert verify_split(tmp_path / corpus / "train", Limits(), 1).problems == []


def test_url_tables_describe_the_same_scenes(tmp_path):
    write_corpora(tmp_path / "synth", options(pair_share=0))
    tables = write_url_tables(tmp_path / "www", "http://127.0.0.1:1/", options())
    assert [table.name for table in tables] == ["test.tsv", "dev.tsv", "train.tsv"]
    with open(tmp_path / "www" / "dev.tsv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [row["caption"] for row in rows] == list(
        row_texts(tmp_path / "synth" / "dev", read_manifest(tmp_path / "synth" / "dev"))
    )
    assert rows[0]["url"] == "http://127.0.0.1:1/images/dev/dev_0000000.jpg"
    assert json.loads(rows[0]["questions"])[0]["answer"] == rows[0]["main_colour"]
    assert Image.open(tmp_path / "www" / "images" / "dev" / "dev_0000000.jpg").size == (64, 64)


@pytest.mark.parametrize(
    "wrong",
    [{"captions_per_image": 9}, {"image_size": 8}, {"pair_share": 2.0}, {"train": 0, "dev": 0, "test": 0}, {"dev": -1}],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(PrepError):
        options(**wrong)
