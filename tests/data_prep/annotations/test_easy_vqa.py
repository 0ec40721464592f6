"""easy-VQA and the statements about pairs of its images: held-out images, balance, no way without the pictures."""

import itertools
import json
from collections import Counter, defaultdict

import pytest

from data_prep.__main__ import main
from data_prep.annotations.annotated import AnnotatedSplit
from data_prep.annotations.easy_pairs import make_pairs, sentences
from data_prep.annotations.easy_vqa import COLOURS, SHAPES, colour_and_shape, held_out_images, read_easy_vqa
from data_prep.manifest import ManifestError, find_splits
from data_prep.record import PrepError
from data_prep.vqa_answers import read_vocabulary
from tests.data_prep.annotations.prepared import images, metas, overlap, picture, prepare, put, write_json

KINDS = list(itertools.product(COLOURS, SHAPES))


def make_easy_vqa(folder, num_images=96, split="train", first=0):
    """easy-VQA's layout; image N shows KINDS[N % 24], told by questions of every form of the published set."""
    entries = []
    for number in range(first, first + num_images):
        colour, shape = KINDS[number % len(KINDS)]
        other = COLOURS[(COLOURS.index(colour) + 1) % len(COLOURS)]
        entries += [
            ["what color is the shape?", colour, number],
            [f"what is the {colour} shape?", shape, number],
            [f"does the image not contain a {other} shape?", "yes", number],
            [f"is no {shape} present?", "no", number],
        ]
        put(folder / split / "images" / f"{number}.png", picture(number, "PNG"))
    write_json(folder / split / "questions.json", entries)
    return folder


def test_a_vqa_corpus_with_held_out_images(tmp_path, capsys):
    """In VQAv2's form: ten answers, ids that are unique, a vocabulary beside; dev is a share of the images."""
    make_easy_vqa(tmp_path / "in")
    make_easy_vqa(tmp_path / "in", 4, "test")
    output = tmp_path / "data" / "easy_vqa"
    command = ("easy_vqa", "--input", tmp_path / "in", "--output", output, "--dev-share", ".25")
    assert prepare(*command) == 0
    printed = capsys.readouterr().out
    assert "train and dev: 384 questions (published: 38,575, 38,191 fewer), 96 images" in printed
    train, dev, test = (metas(output / split) for split in ("train", "dev", "test"))
    assert [len(split) for split in (train, dev, test)] == [72, 24, 4]
    assert not {meta["image_id"] for meta in train} & {meta["image_id"] for meta in dev}
    first = next(meta for meta in train + dev if meta["image_id"] == 0)
    assert first == {
        "image_id": 0,
        "source": "easy_vqa",
        "file": "0.png",
        "image_identities": ["easy_vqa_train/0"],
        "question_id": [0, 1, 2, 3],
        "answers": [["black"] * 10, ["circle"] * 10, ["yes"] * 10, ["no"] * 10],
        "answer_type": ["other", "other", "yes/no", "yes/no"],
        "question_type": ["color", "shape", "yes/no", "yes/no"],
        "captions": [
            "what color is the shape?",
            "what is the black shape?",
            "does the image not contain a blue shape?",
            "is no circle present?",
        ],
    }
    ids = [number for meta in train + dev for number in meta["question_id"]]
    assert sorted(ids) == list(range(384))
    assert all(content == picture(int(name[6:11]), "PNG") for name, content in images(output / "dev").items())
    counts = Counter(answers[0] for meta in train for answers in meta["answers"])
    assert min(counts.values()) < 9
    assert set(read_vocabulary(output / "answers.json")) == {answer for answer, count in counts.items() if count >= 9}
    assert overlap(output) == 0
    assert prepare(*command, "--overwrite", "--min-answer-count", "1") == 0
    assert len(read_vocabulary(output / "answers.json")) == 13


def test_questions_are_no_captions(tmp_path, capsys):
    """A root such as data/ is searched for captions; a corpus of questions is taken where it is named."""
    make_easy_vqa(tmp_path / "in")
    data = tmp_path / "data"
    assert prepare("easy_vqa", "--input", tmp_path / "in", "--output", data / "easy") == 0
    assert find_splits(data / "easy", "train") == [data / "easy" / "train"]
    assert find_splits(data, "train", texts="questions") == find_splits(data, "train", texts=None)
    with pytest.raises(ManifestError, match="no captions here: .*easy/train holds questions; name its corpus"):
        find_splits(data, "train")
    assert prepare("synth", "--output", data / "synth", "--train", 3, "--dev", 0, "--test", 0, "--pair-share", 0) == 0
    assert find_splits(data, "train") == [data / "synth" / "train"]
    assert find_splits(data, "train", texts=None) == [data / "easy" / "train", data / "synth" / "train"]
    assert main(["tokenizer", "--data", str(data), "--output", str(tmp_path / "tokenizer")]) == 0
    assert "easy/train" in capsys.readouterr().out
    assert '"texts": "questions"' in (data / "easy" / "train" / "manifest.json").read_text()
    assert '"texts"' not in (data / "synth" / "train" / "manifest.json").read_text()


def test_the_held_out_images_depend_on_nothing_but_seed_and_id():
    numbers = list(range(1000))
    held_out = held_out_images(numbers, 0.1, 0)
    assert len(held_out) == 100 and sorted(held_out) == sorted(held_out_images(numbers[::-1], 0.1, 0))
    assert set(held_out) != set(held_out_images(numbers, 0.1, 1))
    # Of fewer images those that remain keep their turn: hash order, not a draw.
    assert set(held_out_images(numbers[:500], 0.1, 0)) <= set(held_out_images(numbers[:500], 0.2, 0))


def test_the_shape_is_what_questions_and_answers_say(tmp_path):
    told = {
        ("circle", "is there a triangle?no", "is no rectangle present?yes"): "by elimination",
        ("circle", "what color is the circle?red"): "named by a question",
        (None, "is there a triangle in the image?no"): "two are left",
    }
    for number, (shape, *lines) in enumerate(told):
        entries = [[line.partition("?")[0] + "?", line.partition("?")[2], 7] for line in lines]
        write_json(tmp_path / str(number) / "train" / "questions.json", entries)
        image = read_easy_vqa(tmp_path / str(number), 0.0)[0][0].images[0]
        assert colour_and_shape(image)[1] == shape, told[(shape, *lines)]
    entries = [["what shape is present?", "circle", 7], ["is there not a circle?", "yes", 7]]
    write_json(tmp_path / "x" / "train" / "questions.json", entries)
    with pytest.raises(ValueError, match="image 7: its questions and answers contradict each other"):
        colour_and_shape(read_easy_vqa(tmp_path / "x", 0.0)[0][0].images[0])


@pytest.fixture(scope="module", params=[1, 8])
def pairs(request, tmp_path_factory):
    """Train and dev pairs of a made-up easy-VQA with up to so many statements, and each image's kind by identity."""
    folder = make_easy_vqa(tmp_path_factory.mktemp("easy"), 480)
    splits, _ = read_easy_vqa(folder, 0.2)
    kinds = {image.identities[0]: colour_and_shape(image) for split in splits for image in split.images}
    made = {split.split: make_pairs(split, 1200, per_pair=request.param).images for split in splits}
    assert max(len(pair.captions) for pair in made["train"]) == request.param
    return made, kinds


def statements(split):
    """(pair, text, label, template, identifier) of every statement."""
    for pair in split:
        of_text = (pair.per_caption[name] for name in ("label", "template", "identifier"))
        yield from zip([pair] * len(pair.captions), pair.captions, *of_text, strict=True)


def truth(text, left, right):
    """Whether a statement is true, read off its words alone; independent of how the statements are made."""
    words = text.rstrip(".").split()

    def shows(words, kind):
        return all(word in kind for word in words if word in (*COLOURS, *SHAPES))

    if "same" in words or "different" in words:
        place = 0 if words[-1].startswith("color") else 1
        return (left[place] == right[place]) == ("same" in words)
    if "and" in words:
        cut = words.index("and")
        return shows(words[:cut], left) and shows(words[cut:], right)
    count = shows(words, left) + shows(words, right)
    if words[0] == "the":
        return shows(words, left if words[1] == "left" else right)
    return {"both": count == 2, "exactly": count == 1, "at": count >= 1, "neither": count == 0}[words[0]]


def test_the_labels_are_true(pairs):
    splits, kinds = pairs
    for pair, text, label, _, _ in statements(splits["train"] + splits["dev"]):
        left, right = (kinds[identity] for identity in pair.identities)
        assert label == str(truth(text, left, right)), (pair, left, right)


def test_no_way_to_the_label_without_the_images(pairs):
    """Each sentence is true and false equally often, so the best guess from text is right half the time."""
    for split in pairs[0].values():
        by_text, by_template = defaultdict(Counter), defaultdict(Counter)
        for _, text, label, template, _ in statements(split):
            by_text[text][label] += 1
            by_template[template][label] += 1
        for counts in (*by_text.values(), *by_template.values()):
            assert counts["True"] == counts["False"]
        assert sum(max(counts.values()) for counts in by_text.values()) == 1200 / 2
        assert len(by_template) == 9


def test_pairs_are_of_their_own_images_and_come_once(pairs):
    train, dev = ({identity for pair in split for identity in pair.identities} for split in pairs[0].values())
    assert not train & dev and len(train) > 200
    for split in pairs[0].values():
        rows = [(pair.identities, text) for pair, text, *_ in statements(split)]
        assert len(set(rows)) == len(rows) == 1200 and all(left != right for (left, right), _ in rows)
        names = [identifier for *_, identifier in statements(split)]
        of_set = Counter((name.rsplit("-", 2)[0], text) for name, (_, text) in zip(names, rows, strict=True))
        assert set(of_set.values()) == {4} and len(set(names)) == len(names)
        assert len({pair.key for pair in split}) == len(split)


def test_sentences_are_distinct():
    texts = [sentence.text for sentence in sentences()]
    assert len(set(texts)) == len(texts) == 790


def test_easy_pairs_are_stored_as_nlvr2_is(tmp_path, capsys):
    folder, output = make_easy_vqa(tmp_path / "in", 240), tmp_path / "data" / "easy_pairs"
    command = ("easy_pairs", "--input", folder, "--output", output, "--dev-share", ".2", "--train", 72, "--dev", 36)
    assert prepare(*command) == 0
    assert "72 rows, 72 samples" in capsys.readouterr().out
    meta = metas(output / "train")[0]
    assert meta["label"][0] in ("True", "False") and meta["identifier"] == ["train-0-0-0"] and len(meta["files"]) == 2
    assert overlap(output) == 0
    before = {path.name: path.read_bytes() for path in (output / "train").glob("*.tar")}
    assert prepare(*command, "--overwrite") == 0
    assert {path.name: path.read_bytes() for path in (output / "train").glob("*.tar")} == before


def test_too_few_images_are_said(tmp_path, capsys):
    folder = make_easy_vqa(tmp_path, 6)
    (split,), _ = read_easy_vqa(folder, 0.0)
    with pytest.raises(PrepError, match="6 images of known colour and shape are too few for 4000 statements"):
        make_pairs(split, 4000)
    with pytest.raises(PrepError, match="0 images of known"):
        make_pairs(AnnotatedSplit("dev", [], [], {}), 4)
    with pytest.raises(PrepError, match="6 train statements: expected a multiple of 4"):
        make_pairs(split, 6)
    assert prepare("easy_vqa", "--input", tmp_path / "nowhere") == 2
    assert "questions.json: no such file" in capsys.readouterr().err


def test_entries_of_another_form_are_named(tmp_path, capsys):
    folder = make_easy_vqa(tmp_path / "in", 24)
    path = folder / "train" / "questions.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), ["a?", "yes"], ["a?", "yes", "3"], ["b?", 1, 3]]))
    assert prepare("easy_vqa", "--input", folder, "--check", "--min-answer-count", 1) == 0
    assert (
        "malformed_row: questions.json entry 96 (['a?', 'yes'], expected [question, answer, image id]), and 2 more"
        in (capsys.readouterr().out)
    )
