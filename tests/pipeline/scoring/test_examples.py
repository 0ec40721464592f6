"""Examples of an evaluation: which are shown, that they are the evaluated ones, and where their text attended."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.tokenizer import train_tokenizer
from model.attention_maps import text_attention_map, word_attention
from model.batch import Row
from pipeline.config.command_line import parse_command_line
from pipeline.config.options import Config
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.transforms import clip_transform, decode_image
from pipeline.distributed.places import Place
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.finetuning.retrieval import Retrieval
from pipeline.finetuning.table import task_of
from pipeline.loading.open_data import open_held_out
from pipeline.scoring.confusion import OTHER, matrix
from pipeline.scoring.examples import NO_GRID, choose, write_examples
from pipeline.tasks.evaluation import Lockstep, run_passes
from pipeline.tasks.task import EvaluationRanks
from tests.gallery import captions, write_gallery
from tests.pipeline.finetuning.test_classification import config_of, nlvr2_record, snli_record, vqa_record
from tests.pipeline.finetuning.test_retrieval import configured

RECORDS = {"vqa": vqa_record, "nlvr2": nlvr2_record, "snli_ve": snli_record}


def test_half_of_the_examples_are_right_and_all_are_spread_evenly() -> None:
    right = [number % 4 != 0 for number in range(100)]
    chosen = choose(right, 10)
    assert chosen == sorted(set(chosen)) and sum(right[number] for number in chosen) == 5
    assert [number for number in chosen if not right[number]] == [0, 20, 40, 60, 80]
    assert [number for number in chosen if right[number]] == [1, 21, 41, 61, 81]
    assert choose([True] * 7 + [False], 4) == [0, 2, 4, 7] and choose([False] * 3 + [True], 9) == [0, 1, 2, 3]
    assert choose([None] * 9, 3) == [0, 3, 6] and choose([], 5) == []


def evaluation(config: Config, task=None, seed: int = 3) -> tuple:
    """Objective, preparation, corpora, rows and predictions of a task with random weights."""
    task = task or task_of(config)
    tokenizer = load_tokenizer(Path(config.data.paths[0]) / "tokenizer")
    torch.manual_seed(seed)
    objective = task.build(config, tokenizer.vocabulary).eval()
    preparation = task.preparation(config, objective, tokenizer)
    corpora = open_held_out(config, task.num_images)
    passes = task.passes(config, objective, preparation, corpora, EvaluationRanks(Place(0, 1, 0, "single")))
    run = lambda function, batch: function(objective, batch)  # noqa: E731
    with torch.no_grad():
        found = run_passes(run, passes, Agreement(), Lockstep(Agreement(), StopRequest()))
    return objective, preparation, corpora, passes[0].batches.dataset.rows(), found.predictions


def written(folder: Path, config: Config, parts: tuple, shown: int = 24) -> dict:
    path = write_examples(folder, config.task.name, config, *parts, shown=shown)
    return json.loads(path.read_text())


def values_of(attention: dict) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(attention["values"]), dtype=np.uint8)
    return values.reshape(attention["height"], attention["width"])


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "snli_ve"])
def test_examples_are_the_predictions_with_the_pictures_and_the_attention_of_their_text(
    tmp_path: Path, task: str
) -> None:
    config = config_of(tmp_path, task, [RECORDS[task](number) for number in range(8)])
    parts = objective, preparation, corpora, rows, predictions = evaluation(config)
    found = written(tmp_path, config, parts, shown=6)
    assert (found["task"], found["items"], len(found["examples"])) == (task, len(predictions), 6)
    assert found == written(tmp_path, config, parts, shown=6), "deterministic"
    transform = clip_transform(config.model.vision.image_size, config.data.fast_decode)
    for one in found["examples"]:
        (prediction,) = [
            p for p in predictions
            if (p["key"], p.get("question") or p.get("sentence") or p.get("hypothesis")) == (one["key"], one["text"])
        ]  # fmt: skip
        assert one["prediction"] == (prediction["answer"] if task == "vqa" else prediction["prediction"])
        assert one["right"] == (prediction["score"] >= 0.5 if task == "vqa" else prediction["correct"])
        sample = corpora[0].read(rows[prediction["position"]][1])
        assert sample.text == one["text"] and len(one["images"]) == len(sample.images)
        pixels = torch.stack([transform(decode_image(data)) for data in sample.images])
        batch = preparation.planner(pixels[None], preparation.maker.rows(sample, 0, None))
        maps = text_attention_map(word_attention(objective.net, batch), batch.plan.lengths.tolist())
        for picture, image, attended in zip(one["images"], pixels, maps, strict=True):
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["thumbnail"]))).convert("RGB"))
            assert np.abs(shown.astype(int) - image.permute(1, 2, 0).numpy()).mean() < 12, "JPEG of what was seen"
            assert picture["elsewhere"] == pytest.approx(float(attended[0]), abs=1e-4), "the class token"
            scaled = attended[1:].view(2, 2) / attended[1:].max() * 255
            np.testing.assert_allclose(values_of(picture["attention"]), scaled, atol=0.5)
            assert picture["attention"]["largest"] == pytest.approx(float(attended[1:].max()), abs=1e-5)
    if task == "vqa":
        assert [one["type"] for one in found["types"]] == ["other", "yes/no"]
        assert sum(one["items"] for one in found["types"]) == len(predictions)
    else:
        (counts,) = [np.array(one["counts"]) for one in found["confusion"]]
        assert counts.sum() == len(predictions) and counts.trace() == sum(p["correct"] for p in predictions)


def test_retrieval_shows_the_best_caption_and_the_own_ones(tmp_path: Path) -> None:
    write_gallery(tmp_path / "toy" / "dev", 7)
    train_tokenizer([tmp_path / "toy" / "dev"], tmp_path / "tokenizer", 300)
    config = configured(tmp_path, "--data.num_workers", "0")
    parts = *_, predictions = evaluation(config, Retrieval())
    found = written(tmp_path, config, parts)
    texts = [text for number in range(7) for text in captions(number)]
    for number, (one, prediction) in enumerate(zip(found["examples"], predictions, strict=True)):
        best = texts[int(np.argmax(prediction["_scores"]))]
        assert one["prediction"] == best and one["right"] == (best in captions(number))
        assert one["truth"] == list(captions(number)) and one["images"][0]["attention"]["height"] == 4
    assert found["recall"]["k"] == [1, 2, 3, 5] and len(found["recall"]["text to image"]) == 4


def test_captions_show_each_word_as_the_model_saw_the_image_when_it_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no Java
    write_gallery(tmp_path / "toy" / "dev", 5)
    train_tokenizer([tmp_path / "toy" / "dev"], tmp_path / "tokenizer", 300)
    words = ["--recipe", "flm_tiny", "--data", str(tmp_path), "--task.name", "captioning", "--task.max_tokens", "6"]
    config = parse_command_line([*words, "--output", "run", "--train.eval_samples", "null"]).config
    parts = objective, preparation, corpora, rows, predictions = evaluation(config)
    found = written(tmp_path, config, parts, shown=4)
    tokenizer = preparation.maker.tokenizer
    for one in found["examples"]:
        (prediction,) = [p for p in predictions if p["key"] == one["key"]]
        assert (one["prediction"], one["truth"], one["right"]) == (
            prediction["caption"],
            prediction["references"],
            None,
        )
        ids = tokenizer.encode(prediction["caption"], config.data.max_text_length)
        pieces = [(place, tokenizer.decode([token])) for place, token in enumerate(ids[1:-1])]
        pieces = [(place, piece) for place, piece in pieces if piece]  # not that of a blank
        assert [word["word"] for word in one["words"]] == [piece for _, piece in pieces]
        sample = corpora[0].read(rows[prediction["position"]][1])
        transform = clip_transform(config.model.vision.image_size, config.data.fast_decode)
        pixels = transform(decode_image(sample.images[0]))[None, None]
        attention = word_attention(objective.net, objective.planner(0)(pixels, [Row(ids, 0, 0, "pair")]))[0, :, 1:]
        for (place, _), word in zip(pieces, one["words"], strict=True):
            scaled = attention[place].view(4, 4) / attention[place].max() * 255
            np.testing.assert_allclose(values_of(word["attention"]), scaled, atol=0.5)
    assert any(one["words"] for one in found["examples"])


def test_of_a_written_answer_the_attention_of_the_question_is_drawn(tmp_path: Path) -> None:
    config = config_of(tmp_path, "vqa", [vqa_record(number) for number in range(5)])
    config.task.generative, config.task.max_answer_tokens = True, 4
    parts = objective, preparation, corpora, rows, predictions = evaluation(config)
    found = written(tmp_path, config, parts, shown=4)
    tokenizer = preparation.maker.tokenizer
    for one in found["examples"]:
        ids = tokenizer.encode(one["text"], config.data.max_text_length)
        prediction = next(p for p in predictions if (p["key"], p["question"]) == (one["key"], one["text"]))
        assert one["prediction"] == prediction["answer"]
        sample = corpora[0].read(rows[prediction["position"]][1])
        pixels = clip_transform(32, config.data.fast_decode)(decode_image(sample.images[0]))[None, None]
        batch = objective.planner(len(ids) - 2)(pixels, [Row(ids, 0, 0, "pair")])
        attended = text_attention_map(word_attention(objective.net, batch), [len(ids)])[0, 1:]
        shown = values_of(one["images"][0]["attention"])
        np.testing.assert_allclose(shown, attended.view(2, 2) / attended.max() * 255, atol=0.5)


def test_what_cannot_be_shown_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, "snli_ve", [snli_record(number) for number in range(3)])
    parts = evaluation(config)
    assert write_examples(tmp_path, "toy", config, *parts) is None and not (tmp_path / "examples.json").exists()
    monkeypatch.setattr("pipeline.scoring.examples.grid_of", lambda tower: None)
    found = written(tmp_path, config, parts)
    assert found["note"] == NO_GRID and all("attention" not in one["images"][0] for one in found["examples"])
    tar = next((tmp_path / "toy" / "dev").glob("*.tar"))
    parts[2][0].close()
    tar.write_bytes(tar.read_bytes().replace(b"\xff\xd8\xff", b"bad"))
    parts = *parts[:2], [Corpus(corpus.split_dir, corpus.manifest) for corpus in parts[2]], *parts[3:]
    assert written(tmp_path, config, parts)["examples"] == []


def test_a_matrix_counts_rare_answers_together() -> None:
    pairs = [("yes", "no")] * 3 + [("yes", "yes")] * 9 + [(f"a{n}", "no") for n in range(9)] + [("a1", "a2")]
    found = matrix("t", pairs)
    assert found["names"][:2] == ["yes", "no"] and found["names"][-1] == OTHER and len(found["names"]) == 9
    counts = found["counts"]
    assert counts[0][1] == 3 and counts[0][0] == 9 and counts[-1][-1] is None
    assert sum(value or 0 for row in counts for value in row) == len(pairs)
    assert matrix("t", [("a", "b")], ["a", "b"]) == {"title": "t", "names": ["a", "b"], "counts": [[0, 1], [0, 0]]}
