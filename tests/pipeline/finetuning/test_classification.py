"""VQA, NLVR2 and SNLI-VE from shards to scores, on small corpora of their schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_prep.checks.verify import verify_split
from data_prep.filters import Limits
from data_prep.record import Record
from data_prep.shard_writer import SplitWriter
from data_prep.tokenizer import train_tokenizer
from data_prep.vqa_answers import vocabulary_file
from pipeline.config.options import Config, ConfigError
from pipeline.config.task_options import task_options
from pipeline.data.shard_reader import RawSample
from pipeline.data.tokenizer import load_tokenizer
from pipeline.distributed.places import Place
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.finetuning.table import task_of
from pipeline.finetuning.vqa import AnswerLabels
from pipeline.loading.open_data import open_held_out
from pipeline.metrics.vqa import accuracy
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.task import EvaluationRanks, texts_of
from tests.pipeline.data.test_reader import jpeg, write_split
from tests.tiny_flm import tiny_config

ANSWERS = ["yes", "no", "2", "red"]
VOTES = [["yes"] * 10, ["No."] * 4 + ["yes"] * 6, ["two"] * 3 + ["red"] * 7, ["purple"] * 10]


def vqa_record(number: int, answered: bool = True) -> Record:
    questions = tuple(f"question {n} of image {number}" for n in range(number % 4 + 1))
    meta: dict[str, Any] = {"question_id": [10 * number + n for n in range(len(questions))]}
    if answered:
        meta["answers"] = [VOTES[(number + n) % 4] for n in range(len(questions))]
        meta["answer_type"] = [["yes/no", "other"][n % 2] for n in range(len(questions))]
    return Record(f"v{number:03d}", (jpeg(number),), questions, meta, ("jpg",))


def nlvr2_record(number: int, num_images: int = 2) -> Record:
    sentences = ("both show one thing", "the left one is red")
    meta = {"label": ["True", "False"], "identifier": [f"dev-{n}-{number}-{n}" for n in range(2)]}
    images = tuple(jpeg(num_images * number + image) for image in range(num_images))
    return Record(f"p{number:03d}", images, sentences, meta, ("jpg",) * num_images)


def snli_record(number: int) -> Record:
    hypotheses = ("a thing is there", "nothing is there", "it may be red")
    labels = ["entailment", "contradiction", "neutral"]
    meta = {"label": labels, "pair_id": [f"{number}#{n}" for n in range(3)]}
    return Record(f"s{number:03d}", (jpeg(number),), hypotheses, meta, ("jpg",))


def config_of(folder: Path, task: str, records: list[Record], objective: str = "flm") -> Config:
    """A configuration of a tiny model on ``records``, which are both splits."""
    write_split(folder / "toy" / "train", records)
    write_split(folder / "toy" / "dev", records)
    train_tokenizer([folder / "toy" / "train"], folder / "tokenizer", 300)
    if task == "vqa":
        content = vocabulary_file([(answer, 9) for answer in ANSWERS], ["train"])
        (folder / "answers.json").write_text(json.dumps(content))
    config = Config(model=tiny_config(), task=task_options(task))
    config.objective = type(config.objective)()
    config.data.paths, config.data.max_text_length, config.data.num_workers = [str(folder)], 16, 0
    config.optim.micro_batch_size, config.train.eval_samples = 4, None
    return config


def evaluated(config: Config, change: Any = None, place: Place | None = None) -> tuple[dict, list[dict], nn.Module]:
    """Values and predictions of a task with random weights, ``change`` applied to its objective."""
    task = task_of(config)
    tokenizer = load_tokenizer(Path(config.data.paths[0]) / "tokenizer")
    torch.manual_seed(3)
    objective = task.build(config, tokenizer.vocabulary).eval()
    if change is not None:
        change(objective)
    preparation = task.preparation(config, objective, tokenizer)
    ranks = EvaluationRanks(place or Place(0, 1, 0, "single"))
    (one,) = task.passes(config, objective, preparation, open_held_out(config, task.num_images), ranks)
    kept: list[dict] = []
    one = one.__class__(**{**vars(one), "write": lambda _, found: kept.extend(found)})
    run = lambda function, batch: function(objective, batch)  # noqa: E731
    values = evaluate(run, [one], Agreement(), StopRequest(), Path("."))
    return values, kept, objective


def always(number: int, head: str) -> Any:
    """Makes a classifier choose class ``number`` whatever it is asked."""

    def change(objective: nn.Module) -> None:
        last = getattr(objective, head)[-1]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.zero_()
            last.bias[number] = 5.0

    return change


def test_vqa_scores_every_question_by_its_answers(tmp_path: Path) -> None:
    records = [vqa_record(number) for number in range(6)]
    values, found, _ = evaluated(config_of(tmp_path, "vqa", records), always(1, "answer_head"))
    asked = [(r.key, q, i, a) for r in records for q, i, a in zip(r.captions, r.meta["question_id"], r.meta["answers"])]
    assert [(one["key"], one["question"], one["question_id"], one["answers"]) for one in found] == asked
    assert [one["position"] for one in found] == list(range(len(asked))) and {one["answer"] for one in found} == {"no"}
    # "no" against four times "No." and six times "yes": each "No." is left out once
    expected = [(4 * min(3 / 3, 1) + 6 * 1) / 10 if votes == VOTES[1] else 0.0 for *_, votes in asked]
    assert [one["score"] for one in found] == pytest.approx(expected)
    assert values["vqa_accuracy"] == pytest.approx(sum(expected) / len(expected)) and values["questions"] == len(asked)
    of_other = [score for one, score in zip(found, expected) if one["answer_type"] == "other"]
    assert values["vqa_accuracy/other"] == pytest.approx(sum(of_other) / len(of_other))
    assert values["vqa_accuracy_standard_error"] > 0


def test_a_question_whose_answers_are_not_in_the_list_is_scored_but_not_learned(tmp_path: Path) -> None:
    known, unknown = (
        vqa_record(0),
        Record("v9", (jpeg(9),), ("q",), {"question_id": [9], "answers": [VOTES[3]]}, ("jpg",)),
    )
    config = config_of(tmp_path, "vqa", [known, unknown])
    values, found, objective = evaluated(config)
    assert len(found) == 2 and values["questions"] == 2
    batch = None
    task = task_of(config)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    preparation = task.preparation(config, objective, tokenizer)
    ranks = EvaluationRanks(Place(0, 1, 0, "single"))
    (one,) = task.passes(config, objective, preparation, open_held_out(config), ranks)
    (batch,) = one.batches
    assert batch.counts == {"vqa": 1} and batch.terms["vqa"].target.tolist() == [[1, 0, 0, 0]]


def test_votes_are_normalised_but_in_released_behaviour() -> None:
    sample = RawSample("k", [], "q", {"question_id": [1], "answers": [["No."] * 4 + ["two"] * 2 + ["yes"] * 4]}, 0)
    classes = {answer: number for number, answer in enumerate(ANSWERS)}
    assert AnswerLabels(classes)(sample)[0] == [(0, 1.0), (1, 1.0), (2, 0.6)]
    assert AnswerLabels(classes, normalised=False)(sample)[0] == [(0, 1.0)]


def test_questions_without_answers_are_answered_for_a_submission(tmp_path: Path) -> None:
    records = [vqa_record(number, answered=False) for number in range(4)]
    config = config_of(tmp_path, "vqa", records)
    values, found, _ = evaluated(config)
    assert set(values) == set() and len(found) == 10
    items = [
        RawSample(record.key, [], text, dict(record.meta), number)
        for record in records
        for number, text in enumerate(record.captions)
    ]
    file = task_of(config).submission(config, found, items)
    assert [one["question_id"] for one in file] == sorted(one["question_id"] for one in found)
    with pytest.raises(ValueError, match=r"question_id 0 .*expected each id"):
        task_of(config).submission(config, found[1:], items)


def test_nlvr2_reads_both_images_and_counts_consistent_sentences(tmp_path: Path) -> None:
    config = config_of(tmp_path, "nlvr2", [nlvr2_record(number) for number in range(5)])
    values, found, _ = evaluated(config, always(1, "pair_head"))
    assert values["accuracy"] == 0.5 and values["consistency"] == 0.5 and values["texts"] == 10
    assert [one["correct"] for one in found] == [True, False] * 5
    seen, _, objective = evaluated(config)
    task, tokenizer = task_of(config), load_tokenizer(tmp_path / "tokenizer")
    preparation = task.preparation(config, objective, tokenizer)
    (one,) = task.passes(
        config, objective, preparation, open_held_out(config, 2), EvaluationRanks(Place(0, 1, 0, "single"))
    )
    batch = next(iter(one.batches))
    swapped = batch.with_images(batch.images.flip(1), lambda tensor: tensor)
    assert not torch.allclose(objective.logits(batch), objective.logits(swapped), atol=1e-4), "which image is which"


@pytest.mark.parametrize("num_images", [1, 3])
def test_a_statement_may_be_about_any_number_of_images(tmp_path: Path, num_images: int) -> None:
    config = config_of(tmp_path, "nlvr2", [nlvr2_record(number, num_images) for number in range(3)])
    with pytest.raises(ValueError, match=rf"{num_images} image\(s\) per sample, expected 2"):
        evaluated(config)
    config.task.num_images = num_images
    values, found, objective = evaluated(config)
    assert values["texts"] == len(found) == 6
    assert verify_split(tmp_path / "toy" / "dev", Limits(), workers=1).problems == []
    assert objective.pair_head[0].in_features == num_images * config.model.text.width


@pytest.mark.parametrize("images", ["hidden", "shuffled"])
def test_without_the_own_images_only_the_text_speaks(tmp_path: Path, images: str) -> None:
    """The control of a balanced set: hidden, one sentence is judged alike with every pair; shuffled, as with others."""
    config = config_of(tmp_path, "nlvr2", [nlvr2_record(number) for number in range(4)])
    _, own, _ = evaluated(config)
    config.task.images = images
    _, found, _ = evaluated(config)
    by_sentence = [[one["probability"] for one in found[start::2]] for start in (0, 1)]
    if images == "hidden":
        assert all(max(values) - min(values) < 1e-6 for values in by_sentence)
    else:  # the image pair of the row half the corpus away
        moved = [one["probability"] for one in (*own[4:], *own[:4])]
        assert [one["probability"] for one in found] == pytest.approx(moved, abs=1e-6)
    assert abs(by_sentence[0][0] - by_sentence[1][0]) > 1e-5
    assert [one["label"] for one in found] == [one["label"] for one in own]


def test_snli_ve_has_the_labels_of_the_specification(tmp_path: Path) -> None:
    config = config_of(tmp_path, "snli_ve", [snli_record(number) for number in range(3)])
    values, found, _ = evaluated(config, always(2, "entailment_head"))
    assert {one["prediction"] for one in found} == {"entailment"} and values["accuracy"] == pytest.approx(1 / 3)
    assert [one["pair_id"] for one in found] == [f"{n}#{k}" for n in range(3) for k in range(3)]


@pytest.mark.parametrize(
    ("task", "meta", "reason"),
    [
        ("vqa", {"answers": [["a"] * 10]}, "no question id"),
        ("vqa", {"question_id": 5}, "no question id"),
        ("nlvr2", {"label": ["true"], "identifier": ["dev-0-0-0"]}, "label is none of False, True"),
        ("nlvr2", {"label": [True], "identifier": ["dev-0-0-0"]}, "label is none of False, True"),
        ("snli_ve", {"label": ["-"], "pair_id": ["1"]}, "label is none of contradiction, neutral, entailment"),
        ("snli_ve", {"label": [], "pair_id": ["1"]}, "no label"),
    ],
)
def test_metadata_that_lack_something_are_counted_by_reason(
    tmp_path: Path, task: str, meta: dict[str, Any], reason: str
) -> None:
    good = {"vqa": vqa_record, "nlvr2": nlvr2_record, "snli_ve": snli_record}[task](1)
    bad = Record("bad", good.images, ("a text",), meta, good.extensions)
    config = config_of(tmp_path, task, [good, bad])
    values, found, objective = evaluated(config)
    assert values["bad_samples"] == 1 and "bad" not in {one["key"] for one in found}
    task_, tokenizer = task_of(config), load_tokenizer(tmp_path / "tokenizer")
    preparation = task_.preparation(config, objective, tokenizer)
    held_out = open_held_out(config, task_.num_images)
    (one,) = task_.passes(config, objective, preparation, held_out, EvaluationRanks(Place(0, 1, 0, "single")))
    assert [problem for batch in one.batches for problem in batch.problems] == [("bad", reason)]


@pytest.mark.slow
def test_values_do_not_depend_on_ranks_and_batch_size(tmp_path: Path) -> None:
    config = config_of(tmp_path, "vqa", [vqa_record(number) for number in range(7)])
    whole, found, _ = evaluated(config)
    for size in (1, 3, 50):
        config.optim.micro_batch_size = size
        values, again, _ = evaluated(config)
        assert [one["answer"] for one in again] == [one["answer"] for one in found]
        assert {n: v for n, v in values.items() if n != "loss"} == {n: v for n, v in whole.items() if n != "loss"}
        parts = [evaluated(config, place=Place(rank, 3, rank, "test"))[1] for rank in range(3)]
        assert sorted(one["position"] for part in parts for one in part) == list(range(len(found)))
        exact = {one["position"]: one["confidence"] for one in again}
        assert all(one["confidence"] == exact[one["position"]] for part in parts for one in part)


def test_a_list_of_answers_that_is_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "vqa", [vqa_record(1)])
    (tmp_path / "answers.json").unlink()
    with pytest.raises(ConfigError, match=r"answers\.json: no such file; `python -m data_prep vqav2`"):
        evaluated(config)
    config.task.answers = str(tmp_path / "mine.json")
    with pytest.raises(ValueError, match=r"mine\.json"):
        evaluated(config)


def test_written_answers_are_scored_as_chosen_ones_and_depend_on_their_own_question_only(tmp_path: Path) -> None:
    records = [vqa_record(number) for number in range(5)]
    long = Record("long", (jpeg(70),), ("word " * 30, "short"), {"question_id": [900, 901]}, ("jpg",))
    config = config_of(tmp_path, "vqa", [*records, long])
    config.task.generative, config.task.max_answer_tokens = True, 4
    (tmp_path / "answers.json").unlink()  # nothing is chosen from it
    values, found, objective = evaluated(config)
    assert len(found) == sum(len(record.captions) for record in records) + 2
    assert values["questions"] == len(found) - 2 and 0 <= values["vqa_accuracy"] <= 1 and values["loss"] > 0
    assert {one["position"]: one["score"] for one in found if "score" in one} == {
        one["position"]: accuracy(one["answer"], one["answers"]) for one in found if "answers" in one
    }
    config.optim.micro_batch_size = 1
    _, alone, _ = evaluated(config)
    assert [one["answer"] for one in alone] == [one["answer"] for one in found]
    assert any(one["answer"] for one in found)


def test_of_a_written_answer_only_the_answer_is_predicted(tmp_path: Path) -> None:
    config = config_of(tmp_path, "vqa", [vqa_record(1)])
    config.task.generative = True
    _, _, objective = evaluated(config)
    task, tokenizer = task_of(config), load_tokenizer(tmp_path / "tokenizer")
    preparation = task.preparation(config, objective, tokenizer)
    ranks = EvaluationRanks(Place(0, 1, 0, "single"))
    (batch,) = task.passes(config, objective, preparation, open_held_out(config), ranks)[0].batches
    targets = batch.terms["caption"].target.tolist()
    ends = [number for number, token in enumerate(targets) if token == tokenizer.vocabulary.eos_id]
    parts = [targets[a:b] for a, b in zip([0, *(end + 1 for end in ends)], ends)]
    answers = [tokenizer.decode(part) for part in parts]
    assert all(answer in {"yes", "no", "2", "red", "purple"} for answer in answers) and len(answers) == 2


def test_a_folder_of_corpora_is_searched_for_the_texts_of_the_task(tmp_path: Path) -> None:
    """Questions are no captions: neither task trains on the other's corpus beside its own."""
    config = config_of(tmp_path, "vqa", [vqa_record(number) for number in range(3)])
    for split in ("train", "dev"):
        with SplitWriter(tmp_path / "asked" / split, "asked", split, texts="questions") as writer:
            writer.add(vqa_record(7))
    found = {texts: [one.name for one in open_held_out(config, texts=texts)] for texts in ("captions", "questions")}
    assert found == {"captions": ["toy"], "questions": ["asked"]}
    assert [texts_of(task_of(Config(task=task_options(name)))) for name in ("vqa", "snli_ve", "captioning")] == [
        "questions",
        "hypotheses",
        "captions",
    ]
