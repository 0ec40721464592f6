"""Retrieval is scored over all pairs, each image once, whatever the ranks and batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_prep.tokenizer import train_tokenizer
from model.batch import Row
from model.build import build_objective
from pipeline.config.command_line import parse_command_line
from pipeline.config.options import Config
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.transforms import clip_transform, decode_image
from pipeline.distributed.places import Place
from pipeline.distributed.preempt import StopRequest
from pipeline.distributed.ranks import Agreement
from pipeline.finetuning.retrieval import Retrieval
from pipeline.metrics.recall import recalls
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.task import EvaluationRanks
from pipeline.weights.sources import load_whole
from tests.gallery import captions, write_gallery

IMAGES = 11
OWNERS = [number for number in range(IMAGES) for _ in captions(number)]
TEXTS = [text for number in range(IMAGES) for text in captions(number)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_gallery(folder / "toy" / "dev", IMAGES)
    train_tokenizer([folder / "toy" / "dev"], folder / "tokenizer", 300)
    return folder


def configured(data: Path, *options: str) -> Config:
    words = ["--recipe", "flm_tiny", "--data", str(data), "--task.name", "retrieval", "--output", "run"]
    return parse_command_line([*words, "--train.eval_samples", "null", *options]).config


def built(config: Config, tokenizer) -> torch.nn.Module:
    torch.manual_seed(0)
    objective = Retrieval().build(config, tokenizer.vocabulary).eval()
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                parameter.mul_(1.6)
    return objective


def sweep(config: Config, objective, tokenizer, corpus: Corpus, world: int = 1) -> tuple[list, dict]:
    """Predictions of all ranks in order, and what they come to."""
    task = Retrieval()
    preparation, predictions = task.preparation(config, objective, tokenizer), []
    for rank in range(world):
        place = Place(rank, world, rank, "environment")
        (one,) = task.passes(config, objective, preparation, [corpus], EvaluationRanks(place))
        one.begin(objective)
        one.measure(objective, one.placeholder)
        for batch in one.batches:
            predictions += one.measure(objective, batch).predictions
    predictions.sort(key=lambda found: found["position"])
    return predictions, one.summarise({}, predictions)


@torch.no_grad()
def from_scratch(config: Config, objective, tokenizer, corpus: Corpus, match) -> np.ndarray:
    """Scores [images, captions] by the whole network on each pair."""
    scores = np.zeros((IMAGES, len(TEXTS)), dtype=np.float32)
    planner = objective.reading_planner
    transform = clip_transform(config.model.vision.image_size, config.data.fast_decode)
    for number, row in enumerate(corpus.first_rows().tolist()):
        pixels = transform(decode_image(corpus.read(row).images[0], config.data.max_pixels))
        rows = [Row(tokenizer.encode(text, config.data.max_text_length), 0, 0, "read") for text in TEXTS]
        batch = planner(pixels[None, None], rows)
        term = batch.terms["read"]
        scores[number] = match(getattr(objective.net(batch), term.source)[term.position]).numpy()
    return scores


def test_every_pair_once_and_recall_by_sorting(data: Path) -> None:
    config, corpus, tokenizer = configured(data), Corpus(data / "toy" / "dev"), load_tokenizer(data / "tokenizer")
    objective = built(config, tokenizer)
    predictions, values = sweep(config, objective, tokenizer, corpus)
    scores = from_scratch(config, objective, tokenizer, corpus, objective.match)
    np.testing.assert_allclose(np.stack([one["_scores"] for one in predictions]), scores, atol=1e-5)
    assert [one["image_id"] for one in predictions] == [1000 + number for number in range(IMAGES)]
    for k in (1, 5, 10):
        found = [any(OWNERS[text] == image for text in np.argsort(-scores[image])[:k]) for image in range(IMAGES)]
        shown = [owner in np.argsort(-scores[:, text])[:k] for text, owner in enumerate(OWNERS)]
        assert values[f"tr_at_{k}"] == pytest.approx(np.mean(found))
        assert values[f"ir_at_{k}"] == pytest.approx(np.mean(shown))
    assert (values["images"], values["captions"]) == (IMAGES, len(TEXTS))
    assert 0 < values["tr_at_5_standard_error"] < 0.5
    for image, one in enumerate(predictions):
        order = np.argsort(-scores[image])
        assert one["captions"] == [tokenizer.decode(tokenizer.encode(TEXTS[text], 50)) for text in order[:5]]
        assert one["right"] == [OWNERS[text] == image for text in order[:5]]
        assert one["rank"] == 1 + next(rank for rank, text in enumerate(order) if OWNERS[text] == image)


def test_the_matrix_is_written_beside_the_scorecard(data: Path, tmp_path: Path) -> None:
    config, corpus, tokenizer = configured(data), Corpus(data / "toy" / "dev"), load_tokenizer(data / "tokenizer")
    objective, task = built(config, tokenizer), Retrieval()
    predictions, values = sweep(config, objective, tokenizer, corpus)
    ranks = EvaluationRanks(Place(0, 1, 0, "single"))
    (one,) = task.passes(config, objective, task.preparation(config, objective, tokenizer), [corpus], ranks)
    one.write(tmp_path, predictions)
    owners = json.loads((tmp_path / "captions.json").read_text())["image_of_caption"]
    again = recalls(np.load(tmp_path / "scores.npy"), owners)
    assert again == {name: values[name] for name in again}


@pytest.mark.parametrize(("world", "batch"), [(2, 3), (4, 1), (1, 11)])
def test_scores_are_the_same_bits_for_any_ranks_and_batches(data: Path, world: int, batch: int) -> None:
    config, corpus, tokenizer = configured(data), Corpus(data / "toy" / "dev"), load_tokenizer(data / "tokenizer")
    objective = built(config, tokenizer)
    expected, values = sweep(config, objective, tokenizer, corpus)
    config.optim.micro_batch_size = batch
    predictions, again = sweep(config, objective, tokenizer, corpus, world)
    assert [one["position"] for one in predictions] == list(range(IMAGES))
    assert all(
        np.array_equal(one["_scores"], other["_scores"]) for one, other in zip(predictions, expected, strict=True)
    )
    assert again == values


def test_a_rank_that_has_run_dry_keeps_step(data: Path) -> None:
    """Ranks that share weights must run as many tiles; the others say when they have done all."""
    config, corpus, tokenizer = configured(data), Corpus(data / "toy" / "dev"), load_tokenizer(data / "tokenizer")
    objective, task, asked = built(config, tokenizer), Retrieval(), []

    def all_agree(done: bool) -> bool:
        asked.append(done)
        return len(asked) > 3

    ranks = EvaluationRanks(Place(0, 1, 0, "single"), all_agree=all_agree)
    (one,) = task.passes(config, objective, task.preparation(config, objective, tokenizer), [corpus], ranks)
    one.begin(objective)
    assert not one.measure(objective, one.placeholder).predictions and asked == [True] * 4


def test_part_of_the_split_with_its_own_captions(data: Path) -> None:
    config, corpus, tokenizer = configured(data), Corpus(data / "toy" / "dev"), load_tokenizer(data / "tokenizer")
    objective = built(config, tokenizer)
    whole, _ = sweep(config, objective, tokenizer, corpus)
    config.train.eval_samples = 4
    part, values = sweep(config, objective, tokenizer, corpus)
    images = [number * IMAGES // 4 for number in range(4)]
    columns = [text for text, owner in enumerate(OWNERS) if owner in images]
    assert (values["images"], values["captions"]) == (4, len(columns))
    for one, image in zip(part, images, strict=True):
        np.testing.assert_allclose(one["_scores"], whole[image]["_scores"][columns], atol=1e-5)


def test_an_unreadable_image_is_left_out_with_its_captions(tmp_path: Path, data: Path) -> None:
    corpus = Corpus(write_gallery(tmp_path / "toy" / "dev", IMAGES, broken=(2,)))
    config, tokenizer = configured(data), load_tokenizer(data / "tokenizer")
    predictions, values = sweep(config, built(config, tokenizer), tokenizer, corpus)
    assert [one["position"] for one in predictions] == [0, 1, *range(3, IMAGES)]
    assert (values["images"], values["captions"]) == (IMAGES - 1, len(TEXTS) - len(captions(2)))


def test_an_image_that_is_there_twice_is_named(tmp_path: Path, data: Path) -> None:
    corpus = Corpus(write_gallery(tmp_path / "toy" / "dev", IMAGES, twice=3))
    config, tokenizer = configured(data), load_tokenizer(data / "tokenizer")
    with pytest.raises(ValueError, match="image 1003 stands twice in .*prepare the split again"):
        sweep(config, built(config, tokenizer), tokenizer, corpus)


def test_a_pretrained_model_is_scored_by_its_matching_head(data: Path, tmp_path: Path) -> None:
    """A rank head that starts from image-text matching gives the log-odds that both belong together."""
    config, corpus, tokenizer = configured(data), Corpus(data / "toy" / "dev"), load_tokenizer(data / "tokenizer")
    pretrained = build_objective(config.model, config.objective, tokenizer.vocabulary, config.data.max_text_length)
    with torch.no_grad():
        pretrained.itm_head.bias += torch.tensor([0.3, -0.1])
    save_file(pretrained.state_dict(), tmp_path / "weights.safetensors")
    objective = built(config, tokenizer)
    load_whole(objective, str(tmp_path))
    predictions, _ = sweep(config, objective, tokenizer, corpus)

    def log_odds(features: torch.Tensor) -> torch.Tensor:
        probability = pretrained.itm_head(pretrained.net.pooler(features)).double().softmax(1)
        return (probability[:, 1] / probability[:, 0]).log().float()

    scores = from_scratch(config, objective, tokenizer, corpus, log_odds)
    np.testing.assert_allclose(np.stack([one["_scores"] for one in predictions]), scores, atol=1e-4)


def test_values_come_through_the_evaluation_of_training(data: Path) -> None:
    config, corpus, tokenizer = configured(data), Corpus(data / "toy" / "dev"), load_tokenizer(data / "tokenizer")
    objective, task = built(config, tokenizer), Retrieval()
    ranks = EvaluationRanks(Place(0, 1, 0, "single"))
    passes = task.passes(config, objective, task.preparation(config, objective, tokenizer), [corpus], ranks)
    run = lambda function, batch: function(objective, batch)  # noqa: E731
    values = evaluate(run, passes, Agreement(), StopRequest())
    assert set(values) >= {score.name for score in task.scores(objective)}
    assert values == sweep(config, objective, tokenizer, corpus)[1]
