"""openflm.load and what it gives: what evaluations and independent computations give for the same images and texts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import openflm
from data_prep.vqa_answers import answers_hash, vocabulary_file
from model.decode.stream import decoder_of
from model.objectives.pretraining import Pretraining
from model.plans.captions import CaptionForm
from model.scoring.pairs import encode_captions, encode_image, score_captions
from pipeline.data.shard_reader import RawSample, open_corpora
from pipeline.data.tokenizer import clean_caption
from pipeline.pictures.pictures import pictures_of
from pipeline.tasks.captioning import load_captioner
from pipeline.using.model import Model
from tests.evaluated_run import predictions_of
from tests.pipeline.data.test_reader import jpeg
from tests.rounding import rounding
from tests.tiny_runs import ANSWERS, KINDS, write_kind

Loader = Callable[[str], Model]
ABILITIES = {
    "caption": {
        "flm",
        "mlm",
        "ar",
        "prefixlm",
        "captioning",
        "flm_released",
        "captioning_released",
        *(name for name in KINDS if name.startswith("evlgen")),
    },
    "answer": {"vqa", "vqa_written", "nlvr2", "snli_ve", "evlgen_vqa"},
}
ABILITIES["caption"] -= {"evlgen_vqa"}
ABILITIES["match"] = ABILITIES["caption"] | {"nlvr2", "snli_ve", "retrieval"}
PICTURES = [jpeg(number) for number in range(5)]
CAPTIONS = ["a red dog number 1 is here", "a cat", "number 3 again", "a blue bird", "a white dog is here again"]
# Patches of 192 values, of each of 2 + 3 layers the projections (16 wide), the feed-forward layer (32 wide) and what is
# attended to (24 words, 17 patches); 320 words at the end; large weights make numbers of order 10.
ROUNDING = 10 * rounding(192, *[16 * 6 + 32 + 24 + 17] * 5, 320)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_its_abilities_and_says_who_has_the_others(model_of: Loader, kind: str) -> None:
    model = model_of(kind)
    assert model.abilities == {name for name, kinds in ABILITIES.items() if kind in kinds} | {"features"}
    uses = {
        "caption": lambda: model.caption(PICTURES[0]),
        "answer": lambda: model.answer(PICTURES[0], "what is it"),
        "match": lambda: model.match(PICTURES[0], "a cat"),
    }
    for ability in set(uses) - model.abilities:
        with pytest.raises(ValueError, match=f"it can't {ability}, only .*use one of") as error:
            uses[ability]()
        assert "\n" not in str(error.value)
    assert (model.name, model.image_size) == (kind, 32)
    assert model.match_meaning is None or "match" in model.abilities


@pytest.mark.parametrize("kind", ["flm", "captioning", "mlm", "evlgen_tomeformer", "evlgen_qformer"])
def test_captions_are_those_of_the_generate_program(model_of: Loader, tiny_data: Path, kind: str) -> None:
    model = model_of(kind)
    captioner = load_captioner(tiny_data.parent / kind, torch.device("cpu"))
    pixels = [captioner.pictures.of(RawSample("", [data], "", {})) for data in PICTURES]
    expected = captioner.caption(pixels)
    assert model.caption(PICTURES) == expected and len(set(expected)) > 1
    assert model.caption(PICTURES, batch_size=2) == expected
    assert model.caption(PICTURES[3]) == expected[3]
    *before, last = model.caption_stream(PICTURES[3])
    assert last == expected[3]
    assert kind == "mlm" or (len(before) > 1 and all(last.startswith(one.rstrip("\ufffd")) for one in before))
    if kind != "mlm":
        assert model.caption(PICTURES[0], prompt="a red", beams=3, max_tokens=6).startswith("a red")


def test_clips_are_captioned_from_files_and_from_frames(model_of: Loader, tiny_data: Path) -> None:
    model = model_of("evlgen_video")
    (corpus,) = open_corpora([str(tiny_data / "moving")], "dev", videos=True)
    clips = [corpus.read(row).video for row in range(2)]
    expected = model.caption(clips)
    assert isinstance(expected, list) and model.caption(clips[1]) == expected[1]
    frames = [model.pixels(clip).transpose(0, 2, 3, 1) for clip in clips]  # 3 of them, which are all chosen
    assert model.caption(frames) == expected
    with pytest.raises(ValueError, match="one of clips, found an array of uint8"):
        model.caption(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="not a video"):
        model.caption(PICTURES[0])


@pytest.mark.parametrize("kind", ["vqa", "vqa_written", "evlgen_vqa", "nlvr2", "snli_ve"])
def test_answers_are_those_of_an_evaluation(model_of: Loader, tiny_data: Path, kind: str) -> None:
    model, (expected, corpora) = model_of(kind), predictions_of(tiny_data.parent / kind)
    images, questions = [], []
    for row in range(len(corpora[0])):
        sample = corpora[0].read(row)
        images.append(sample.images if kind == "nlvr2" else sample.images[0])
        questions.append(sample.text)
    found = model.answer(images, questions, batch_size=4)
    name = "prediction" if kind in ("nlvr2", "snli_ve") else "answer"
    wanted = [one[name].lower() if kind == "nlvr2" else one[name] for one in expected]
    assert [answer for answer, _ in found] == wanted
    for (answer, probability), one in zip(found, expected, strict=True):
        if kind == "vqa":
            assert math.isclose(probability, one["confidence"], rel_tol=ROUNDING)
        elif kind == "snli_ve":
            assert math.isclose(probability, one["probabilities"][answer], rel_tol=ROUNDING)
        elif kind == "nlvr2":
            assert math.isclose(probability if answer == "true" else 1 - probability, one["probability"], rel_tol=1e-4)
        else:
            assert probability is None
    assert model.answer(images[1], questions[1])[0] == found[1][0]
    both = model.answer(images[0], questions[:2])
    assert [answer for answer, _ in both] == [model.answer(images[0], text)[0] for text in questions[:2]]


def test_the_most_probable_answers_come_first(model_of: Loader) -> None:
    model = model_of("vqa")
    (several,) = model.answer([PICTURES[0]], ["is it red"], top=3)
    assert [value for _, value in several] == sorted((value for _, value in several), reverse=True)
    assert several[0] == model.answer(PICTURES[0], "is it red") and len(several) == 3
    assert len(model.answer(PICTURES[0], "is it red", top=99)) == len(model.answers)
    with pytest.raises(ValueError, match="top is 2, expected 1; this model writes its answers"):
        model_of("vqa_written").answer(PICTURES[0], "is it red", top=2)


@pytest.mark.parametrize("kind", ["flm", "mlm", "ar", "prefixlm"])
def test_a_match_is_what_the_matching_head_says_of_the_whole_network(model_of: Loader, kind: str) -> None:
    model = model_of(kind)
    found = model.match(PICTURES, CAPTIONS)
    objective, tokenizer = model._trained.objective, model._trained.run.tokenizer
    assert isinstance(objective, Pretraining) and "image-text matching" in model.match_meaning
    captions = encode_captions(objective.net, objective.planner, [tokenizer.encode(text, 20) for text in CAPTIONS])

    def head(features: torch.Tensor) -> torch.Tensor:
        return objective.itm_head(objective.net.pooler(features)).softmax(1)[:, 1]

    for number, data in enumerate(PICTURES):  # pairs.py computes what sides share once, in other shapes
        image = encode_image(objective.net, torch.from_numpy(model.pixels(data))[0])
        row = score_captions(objective.net, head, captions, image)
        assert math.isclose(found[number], float(row[number]), rel_tol=ROUNDING, abs_tol=ROUNDING)
        assert np.allclose(model.match(data, CAPTIONS), row.numpy(), rtol=ROUNDING, atol=ROUNDING)
    assert found.dtype == np.float32 and len(set(found.tolist())) == 5


def test_retrieval_matches_as_its_evaluation_ranks(model_of: Loader, tiny_data: Path) -> None:
    model, (expected, corpora) = model_of("retrieval"), predictions_of(tiny_data.parent / "retrieval")
    rows = [corpora[0].read(row) for row in range(len(corpora[0]))]
    captions = [row.text for row in rows]
    for one in expected:
        image = next(row.images[0] for row in rows if row.key == one["key"])
        assert np.allclose(model.match(image, captions), one["_scores"], rtol=ROUNDING, atol=ROUNDING)
    assert "no probability" in model.match_meaning


@pytest.mark.parametrize(
    "kind",
    ["captioning", "captioning_released", "flm_released", "evlgen_tomeformer", "evlgen_pooling", "evlgen_video"],
)
def test_a_likelihood_is_the_mean_over_tokens_fed_one_by_one(model_of: Loader, tiny_data: Path, kind: str) -> None:
    model = model_of(kind)
    data = PICTURES[0]
    if kind == "evlgen_video":
        data = open_corpora([str(tiny_data / "moving")], "dev", videos=True)[0].read(0).video
    found = model.match([data] * len(CAPTIONS), CAPTIONS, batch_size=3)
    objective, tokenizer = model._trained.objective, model._trained.run.tokenizer
    form = getattr(objective, "form", CaptionForm(objective.net.vocabulary))
    room = 50 - len(form.begin) - len(form.end) if "evlgen" in kind else 18 - len(form.begin) - len(form.end)
    for value, text in zip(found, CAPTIONS, strict=True):
        ids = tokenizer.encode(clean_caption(text, full_stop="released" in kind), 99)[1:-1][:room]
        read = ids[:1] if kind == "flm_released" else []  # it never learns the first word
        decoder = decoder_of(objective, torch.from_numpy(model.pixels(data))[None], prompt=read)
        ids = [*ids[len(read) :], *(form.end[:1] or decoder.end_ids[:1])]
        with torch.no_grad():
            scores = decoder.start()
            total = 0.0
            for number, word in enumerate(ids):
                total += float(scores.log_softmax(-1)[0, word])
                if number < len(ids) - 1:
                    scores = decoder.step(torch.tensor([word]))
        assert math.isclose(float(value), total / len(ids), rel_tol=ROUNDING * len(ids))
    assert model.match_meaning.startswith("mean log-likelihood")


@pytest.mark.parametrize("kind", ["flm", "captioning", "snli_ve", "retrieval", "evlgen_tome"])
def test_a_search_is_sorted_matches_and_encodes_each_image_once(
    model_of: Loader, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    tower, encoded = model._trained.objective.net.vision, []
    hook = tower.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    monkeypatch.setattr("pipeline.using.index.AT_ONCE", 2)
    progress: list[tuple[int, int]] = []
    index = model.index(PICTURES, batch_size=2, progress=lambda *both: progress.append(both))
    found = index.search("a white dog", top=3)
    index.search("a cat")
    hook.remove()
    assert sum(encoded) == 5 and progress == [(2, 5), (4, 5), (5, 5)] and len(index) == 5
    scores = model.match(PICTURES, "a white dog")
    order = sorted(range(5), key=lambda number: -scores[number])
    assert [number for number, _ in found] == order[:3]
    assert np.allclose([score for _, score in found], scores[order[:3]], rtol=ROUNDING, atol=ROUNDING)
    assert index.search("a cat", top=99) == index.search("a cat", top=5) and model.index([]).search("a cat") == []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_depends_on_who_shares_a_batch(model_of: Loader, tiny_data: Path, kind: str) -> None:
    model = model_of(kind)
    images = PICTURES
    if kind == "evlgen_video":
        (corpus,) = open_corpora([str(tiny_data / "moving")], "dev", videos=True)
        images = [corpus.read(row).video for row in range(4)]
    if kind == "nlvr2":
        images = [[one, two] for one, two in zip(PICTURES, PICTURES[1:])]
    texts = CAPTIONS[: len(images)]
    for ability in model.abilities - {"caption"}:  # captions: above
        use = getattr(model, ability)
        no_texts = ability == "features" and kind.startswith(("evlgen", "qformer"))
        arguments = (images,) if no_texts else (images, texts)
        whole, apart = use(*arguments), use(*arguments, batch_size=1)
        if ability == "features":
            assert whole.keys() == apart.keys() and {"image", "tokens"} <= whole.keys()
            for name in whole:
                assert whole[name].dtype == np.float32 and len(whole[name]) == len(images)
                assert np.allclose(whole[name], apart[name], rtol=ROUNDING, atol=ROUNDING), name
        elif ability == "match":
            assert np.allclose(whole, apart, rtol=ROUNDING, atol=ROUNDING)
        else:
            assert [answer for answer, _ in whole] == [answer for answer, _ in apart]


def test_features_are_those_of_the_parts(model_of: Loader) -> None:
    model = model_of("ar")
    found = model.features(PICTURES, CAPTIONS)
    net, tokenizer = model._trained.objective.net, model._trained.run.tokenizer
    pixels = torch.from_numpy(np.concatenate([model.pixels(data) for data in PICTURES]))
    with torch.no_grad():
        assert np.allclose(found["tokens"], net.vision(pixels).numpy(), rtol=ROUNDING, atol=ROUNDING)
        for value, text in zip(found["text"], CAPTIONS, strict=True):
            ids = torch.tensor(tokenizer.encode(text, 20))
            states = net.embedding(ids, torch.arange(len(ids)))
            for layer in net.bottom:
                states = layer(states, _causal)
            assert np.allclose(value, states[1:-1].mean(0).numpy(), rtol=ROUNDING, atol=ROUNDING)
    assert np.allclose(found["image"], found["tokens"].mean(1), rtol=ROUNDING, atol=ROUNDING)
    assert found["pair"].shape == (5, 16)
    assert np.array_equal(model.features(texts=CAPTIONS)["text"], found["text"])
    assert model.features(PICTURES[0]).keys() == {"tokens", "image"}
    with pytest.raises(ValueError, match="no text tower"):
        model_of("evlgen_tome").features(texts="a cat")


def _causal(query: torch.Tensor, key_value: None, num_heads: int, rate: float) -> torch.Tensor:
    """Dense causal attention of one text: query [S, 3D] -> [S, D], the reference of ``model.attention``."""
    q, k, v = query.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    mixed = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
    return mixed.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("kind", ["flm", "captioning", "vqa"])
def test_attention_maps_are_of_whole_words(model_of: Loader, kind: str) -> None:
    model = model_of(kind)
    words, maps = model.attention(PICTURES[2], "a red dog is here")
    assert words == ["a", "red", "dog", "is", "here"]
    assert maps.shape == (5, 4, 4) and maps.dtype == np.float32
    assert (maps >= 0).all() and (maps.sum((1, 2)) <= 1 + ROUNDING).all() and maps.max() > 0
    other = model.attention(PICTURES[3], "a red dog is here")[1]
    assert not np.allclose(maps, other, rtol=0.01)
    with pytest.raises(ValueError, match="no attention of words over an image: this model judges 2 images together"):
        model_of("nlvr2").attention([PICTURES[0]] * 2, "a dog")


@pytest.mark.parametrize("kind", ["evlgen_tomeformer", "evlgen_tome"])
def test_merges_name_the_token_of_each_patch(model_of: Loader, kind: str) -> None:
    model = model_of(kind)
    groups = model.merges(PICTURES[1])
    assert groups.shape == (4, 4) and groups.dtype == np.int64
    assert len(np.unique(groups)) == 7 - 1  # the class token stays alone
    with pytest.raises(ValueError, match="merges no patches"):
        model_of("evlgen_pooling").merges(PICTURES[1])


def test_nothing_given_gives_nothing(model_of: Loader) -> None:
    assert model_of("flm").caption([]) == [] and model_of("vqa").answer([], []) == []
    assert model_of("flm").match([], []).shape == (0,) and model_of("flm").match(PICTURES[0], []).shape == (0,)
    assert {name: value.shape for name, value in model_of("flm").features([]).items()} == {
        "tokens": (0, 17, 16),
        "image": (0, 16),
    }


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda model: model.caption(PICTURES, batch_size=0), "batch_size is 0, expected 1 or more"),
        (lambda model: model.match(PICTURES, ["a", "b"]), "5 images and 2 texts: expected as many of both"),
        (lambda model: model.match(PICTURES[0], " "), r"texts\[0\]: expected a text of at least one word, found ' '"),
        (lambda model: model.match(PICTURES[0], [None]), r"texts\[0\]: expected a text"),
        (lambda model: model.attention(PICTURES, "a cat"), "expected a single image, found a list of 5"),
        (lambda model: model.features(), "no images and no texts"),
        (lambda model: model.index(PICTURES).search("a cat", top=0), "top is 0"),
        (lambda model: model.caption(PICTURES[0], lengths=[3]), "lengths is for mlm models"),
        (lambda model: openflm.load("no/such/run"), "no/such/run: found no valid checkpoint"),
    ],
)
def test_a_mistake_is_one_line(model_of: Loader, use: Callable[[Model], object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        use(model_of("flm"))
    assert "\n" not in str(error.value)


def test_answers_of_another_list_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    """In another order the same numbers would mean other answers."""
    trained = {"data": {"answers": answers_hash(ANSWERS)}}
    run = write_kind(tmp_path / "written", tiny_data, "vqa", fingerprint=trained)
    assert openflm.load(run).answers == ANSWERS
    content = vocabulary_file([(answer, 9) for answer in sorted(ANSWERS)], ["train"])
    (run / "answers.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was trained with another answers .*restore the one it was trained with"):
        openflm.load(run)


def test_device_and_dtype_are_chosen(tiny_data: Path, model_of: Loader) -> None:
    whole = model_of("flm")
    half = openflm.load(tiny_data.parent / "flm", device="cpu", dtype="bf16")
    assert (half.dtype, half.device.type) == (torch.bfloat16, "cpu") and whole.dtype == torch.float32
    near = half.match(PICTURES, CAPTIONS)
    assert near.dtype == np.float32 and np.allclose(near, whole.match(PICTURES, CAPTIONS), atol=0.1)
    assert isinstance(half.caption(PICTURES[0]), str) and half.features(PICTURES)["image"].dtype == np.float32
    checkpoint = openflm.load(tiny_data.parent / "flm" / "checkpoints" / "step_00000001", dtype=torch.float32)
    assert checkpoint.name == "flm" and checkpoint.caption(PICTURES[0]) == whole.caption(PICTURES[0])
    with pytest.raises(ValueError, match="device cuda:99: not usable here"):
        openflm.load(tiny_data.parent / "flm", device="cuda:99")
    with pytest.raises(ValueError, match="dtype int8: expected one of float32"):
        openflm.load(tiny_data.parent / "flm", dtype="int8")


def test_pixels_are_those_that_training_sees(model_of: Loader) -> None:
    model = model_of("flm")
    expected = pictures_of(model._trained.run.config).of(RawSample("", [PICTURES[0]], "", {}))
    assert np.array_equal(model.pixels(PICTURES[0]), expected.numpy())
