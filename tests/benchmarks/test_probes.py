"""The probes of the speedrun: the linear reading against its optimality conditions, and what it is given to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.probes.__main__ import _untrained, features_of, measure, probe_run
from benchmarks.probes.data import UNKNOWN, ProbeData, Reader, Split, _questions, choose, encoded
from benchmarks.probes.logistic import fit, read
from model.batch import Row
from model.build import build_objective
from pipeline.config.command_line import parse_command_line
from pipeline.data.shard_reader import open_corpora
from pipeline.data.tokenizer import load_tokenizer, tokenizer_of
from pipeline.data.transforms import clip_transform
from pipeline.pictures.pictures import Pictures
from pipeline.tasks.captioning import Captioner, Item, caption_items
from tests.rounding import TINY
from tests.tiny_corpus import make_corpus
from tests.tiny_frozen_parts import write_language_model


def blobs(num_items: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Three well-separated classes in five dimensions of very different scale."""
    labels = torch.arange(num_items) % 3
    features = torch.randn(num_items, 5, generator=generator)
    features[:, 0] += 20 * (labels == 0)
    features[:, 1] += 20 * (labels == 1)
    return features * torch.tensor([1e-3, 1e3, 1.0, 1.0, 1e-4]), labels


@pytest.mark.slow
def test_separable_classes_are_read_without_a_mistake() -> None:
    generator = torch.Generator().manual_seed(0)
    (features, labels), (test_features, test_labels) = blobs(150, generator), blobs(90, generator)
    reading = read(features, labels, torch.arange(150) // 2, test_features, test_labels, 3)
    assert reading.accuracy == 1
    test_labels[:30] = UNKNOWN
    assert read(features, labels, torch.arange(150), test_features, test_labels, 3).accuracy == pytest.approx(2 / 3)


def test_nothing_is_read_from_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(900, 8, generator=generator), torch.randint(0, 2, (900,), generator=generator)
    reading = read(features[:500], labels[:500], torch.arange(500), features[500:], labels[500:], 2)
    assert abs(reading.accuracy - 0.5) < 0.1  # four deviations of the mean of 400


@pytest.mark.parametrize("penalty", [1e-2, 1.0])
def test_the_fit_meets_the_optimality_conditions(penalty: float) -> None:
    """The minimum is unique, and where the gradient vanishes: X^T (P - Y) / N + penalty W = 0, columns of P = Y."""
    generator = torch.Generator().manual_seed(2)
    features, labels = torch.randn(60, 4, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    model = fit(features, labels, 3, penalty)
    x, weight, bias = (part.double().numpy() for part in (features, *model))
    error = np.zeros((60, 3))
    for item in range(60):
        scores = [np.exp(sum(x[item, f] * weight[f, c] for f in range(4)) + bias[c]) for c in range(3)]
        for c in range(3):
            error[item, c] = scores[c] / sum(scores) - (c == int(labels[item]))
    assert np.abs(x.T @ error / 60 + penalty * weight).max() < 5e-4
    assert np.abs(error.mean(0)).max() < 5e-4
    again = fit(features, labels, 3, penalty, start=model)
    assert torch.allclose(again.weight, model.weight, atol=1e-3)


def item(name: str, *captions: str, questions: object = None) -> Item:
    meta = {} if questions is None else {"questions": questions}
    return Item(name, torch.zeros(3, 8, 8, dtype=torch.uint8), list(captions), meta)


def test_the_blind_answerer_knows_the_type_of_the_question_only() -> None:
    train = Split([], [], [Reader(0, "", label) for label in (0, 0, 1, 2, 2)], ["a", "a", "a", "b", "b"])
    test = Split([], [], [Reader(0, "", label) for label in (0, 1, 2, 0)], ["a", "a", "b", "unseen"])
    assert ProbeData(train, test, ["x", "y", "z"], []).blind_accuracy == 2 / 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("probes") / "data", train=24, dev=12)


def captioner(data: Path, name: str) -> Captioner:
    config = parse_command_line(["--recipe", "flm_tiny", "--objective.name", name, "--data", str(data)]).config
    tokenizer = load_tokenizer(data / "tokenizer")
    torch.manual_seed(0)
    objective = build_objective(config.model, config.objective, tokenizer.vocabulary, 50).eval()
    with torch.no_grad():  # every term counts, also the parts that start at zero
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    transform, device = clip_transform(32), torch.device("cpu")
    return Captioner(objective, tokenizer, Pictures(transform), device, Path(), max_tokens=6, lengths=(5, 6))


def chosen(data: Path, model: Captioner) -> ProbeData:
    train, test = (open_corpora([data], split) for split in ("train", "dev"))
    return choose(train, test, model, train_images=20, test_images=7, caption_images=9)


def test_what_is_asked_is_the_same_for_every_model_and_true_of_the_images(data: Path) -> None:
    found, again = chosen(data, captioner(data, "flm")), chosen(data, captioner(data, "mlm"))
    assert found.train.questions == again.train.questions and found.test.pairs == again.test.pairs
    assert [len(found.train.items), len(found.test.items), len(found.captioned)] == [20, 7, 9]
    for split in (found.train, found.test):
        assert [pair.label for pair in split.pairs] == [1, 0] * len(split.items)
        for own, other in zip(split.pairs[::2], split.pairs[1::2], strict=True):
            assert own.image == other.image and own.text == split.items[own.image].references[0]
            assert other.text not in split.items[own.image].references
        asked = [(question.image, question.text) for question in split.questions]
        listed = [(n, one["question"]) for n, item in enumerate(split.items) for one in item.meta["questions"]]
        assert asked == listed and len(asked) == len(split.types) > 4 * len(split.items) - 1
    truth = [one["answer"] for item in found.train.items for one in item.meta["questions"]]
    assert [found.answers[question.label] for question in found.train.questions] == truth
    assert len({one.name for one in found.train.items} & {one.name for one in found.test.items}) == 0


@pytest.mark.parametrize("name", ["flm", "mlm", "ar", "prefixlm"])
def test_features_stand_in_the_order_of_what_is_asked(data: Path, name: str) -> None:
    model = captioner(data, name)
    split = chosen(data, model).train
    pairs, questions = features_of(model, split)
    assert pairs.shape == (40, 64) and questions.shape[0] == len(split.questions)
    for features, readers, number in ((pairs, split.pairs, 39), (questions, split.questions, 7)):
        ids = model.tokenizer.encode(readers[number].text, 50)
        images = split.items[readers[number].image].pixels[None]
        alone = model.objective.features(model.objective.planner(images, [Row(ids, 0, 0, "read")]))[0]
        assert torch.allclose(features[number], alone, rtol=TINY, atol=TINY)
        assert not torch.allclose(features[number - 1], alone, atol=1e-3)


@pytest.mark.parametrize("name", ["flm", "mlm"])
def test_a_frozen_tower_encodes_each_image_once_for_all_checkpoints(data: Path, name: str) -> None:
    model = captioner(data, name)
    plain, tower, seen = chosen(data, model), model.objective.net.vision, []
    tower.register_forward_hook(lambda _, images, __: seen.append(len(images[0])))
    once = encoded(plain, model)
    assert sum(seen) == len({one.name for one in (*plain.train.items, *plain.test.items, *plain.captioned)})
    for split, other in ((once.train, plain.train), (once.test, plain.test)):
        del seen[:]
        found = features_of(model, split)
        assert not seen
        for mine, theirs in zip(found, features_of(model, other), strict=True):
            assert torch.allclose(mine, theirs, rtol=TINY, atol=TINY)
    del seen[:]
    texts = [text for _, text in caption_items(model, iter(once.captioned), 4)]
    assert not seen and texts == [text for _, text in caption_items(model, iter(plain.captioned), 4)]


@pytest.mark.slow
def test_a_corpus_without_questions_skips_vqa_with_the_reason(data: Path) -> None:
    model = captioner(data, "ar")
    found = chosen(data, model)
    whole = measure(model, found)
    assert {"vqa_accuracy", "vqa_blind", "matching_accuracy", "caption_exact_match", "caption_main_object"} <= set(
        whole
    )
    assert "skipped" not in whole and "caption_cider_d" not in whole
    found.train.questions, found.train.types = [], []
    found.captioned = [item._replace(references=[*item.references, "a second one"]) for item in found.captioned]
    values = measure(model, found)
    assert values["skipped"] == {"vqa": "the samples' metadata holds no questions"} and "vqa_accuracy" not in values
    assert values["matching_accuracy"] == whole["matching_accuracy"] and values["caption_cider_d"] >= 0


@pytest.mark.slow
def test_captions_of_the_right_images_score_above_those_of_others(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = captioner(data, "ar")
    found = chosen(data, model)
    found.captioned = [item._replace(references=[item.references[0]] * 2) for item in found.captioned]
    perfect = lambda model, items, batch_size: ((item, item.references[0]) for item in items)  # noqa: E731
    monkeypatch.setattr("benchmarks.probes.__main__.caption_items", perfect)
    values = measure(model, found)
    assert values["caption_cider_d"] == pytest.approx(10) and values["caption_blind_cider_d"] < 5


@pytest.mark.slow
def test_of_a_frozen_language_model_captions_alone_are_compared(data: Path, tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "llm")
    config = parse_command_line(["--recipe", "evlgen_tiny", "--model.language.name", str(folder)]).config
    tokenizer = tokenizer_of(config)
    objective = build_objective(config.model, config.objective, tokenizer.vocabulary, 32).eval()
    model = Captioner(objective, tokenizer, Pictures(clip_transform(32)), torch.device("cpu"), Path(), max_tokens=6)
    found = encoded(chosen(data, model), model)
    found.captioned = [item._replace(references=[*item.references, "a second one"]) for item in found.captioned]
    values = measure(model, found)
    assert set(values["skipped"]) == {"matching", "vqa"} and values["caption_cider_d"] >= 0
    assert not {"matching_accuracy", "vqa_accuracy"} & set(values)


@pytest.mark.slow
def test_captions_of_released_behaviour_are_left_out_with_the_reason(data: Path) -> None:
    config = parse_command_line(["--recipe", "flm_tiny", "--model.behaviour", "released"]).config
    model = captioner(data, "flm")
    vocabulary = model.tokenizer.vocabulary
    model.objective = build_objective(config.model, config.objective, vocabulary, 50).eval()
    values = measure(model, chosen(data, model))
    assert set(values["skipped"]) == {"caption"} and "prompt" in values["skipped"]["caption"]
    assert values["vqa_accuracy"] >= 0 and values["matching_accuracy"] >= 0


def test_malformed_questions_are_passed_over() -> None:
    good = {"question": "what?", "answer": "red", "type": "colour"}
    listed = [good, {"question": "what?"}, "what?", {"question": 3, "answer": "x"}, {"question": " ", "answer": "x"}]
    assert _questions([item("a", "x"), item("b", "x", questions=listed), item("c", "x", questions="no")]) == [(1, good)]


def test_the_untrained_model_is_the_one_that_training_began_with(data: Path, tmp_path: Path) -> None:
    model = captioner(data, "mlm")
    config = parse_command_line(["--recipe", "flm_tiny", "--objective.name", "mlm", "--train.seed", "5"]).config
    noted = '{"starting_weights": {"vision": {"taken": null}, "text": {"taken": null}}}'
    (tmp_path / "environment.json").write_text(noted)
    torch.manual_seed(5)
    expected = build_objective(config.model, config.objective, model.tokenizer.vocabulary, 50).state_dict()
    found = _untrained(tmp_path, config, model).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (tmp_path / "environment.json").write_text(noted.replace("null", '"other"', 1))
    with pytest.raises(ValueError, match="now found"):
        _untrained(tmp_path, config, model)


def test_a_run_that_is_measured_already_is_left_alone(tmp_path: Path) -> None:
    probe_run(tmp_path, 1, 1, 1, torch.device("cpu"))  # no checkpoint, nothing due
    assert list(tmp_path.iterdir()) == []
