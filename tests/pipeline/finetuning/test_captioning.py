"""Captioning: rows, captions of each image once whatever ranks and batches, their scores, and self-critical rewards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.record import Record
from data_prep.shard_writer import SplitWriter
from data_prep.tokenizer import train_tokenizer
from model.decode.both_ways import ScoreWeights, both_ways
from model.decode.stream import decoder_of
from model.objectives.table import OBJECTIVES
from pipeline.config.command_line import parse_command_line
from pipeline.config.options import Config, ConfigError
from pipeline.data.shard_reader import Corpus
from pipeline.data.tokenizer import clean_caption, load_tokenizer
from pipeline.distributed.places import Place
from pipeline.finetuning.caption_reward import CiderReward, document_frequencies
from pipeline.finetuning.captioning import METRICS_NAME, CaptioningTask, decoding, prompt_words
from pipeline.loading.collate import Item, collate
from pipeline.metrics.captions import IN_LOOP, caption_scores
from pipeline.metrics.cider import DocumentFrequencies, cider_scores, plain_words
from pipeline.metrics.submissions import SubmissionError
from pipeline.tasks.task import EvaluationRanks
from tests.gallery import captions, png, write_gallery

IMAGES = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "dev"):
        write_gallery(folder / "toy" / split, IMAGES)
    train_tokenizer([folder / "toy" / "dev"], folder / "tokenizer", 300)
    return folder


def configured(data: Path, *options: str) -> Config:
    words = ["--recipe", "flm_tiny", "--data", str(data), "--task.name", "captioning", "--output", "run"]
    return parse_command_line([*words, "--train.eval_samples", "null", *options]).config


def built(config: Config, tokenizer) -> torch.nn.Module:
    """A model whose captions hang on the image: large weights of random networks, and an end that comes soon."""
    torch.manual_seed(0)
    objective = CaptioningTask().build(config, tokenizer.vocabulary).eval()
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if parameter.ndim > 1 and "vision" not in name:
                parameter.mul_(1.6)
    return objective


def sweep(config: Config, objective, tokenizer, corpus: Corpus, world: int = 1, **ranks):
    """Predictions of all ranks in order, what they come to, and the writer of the captions."""
    task, predictions = CaptioningTask(), []
    preparation = task.preparation(config, objective, tokenizer)
    for rank in range(world):
        place = Place(rank, world, rank, "environment")
        one, losses = task.passes(config, objective, preparation, [corpus], EvaluationRanks(place, **ranks))
        with torch.no_grad():
            one.measure(objective, one.placeholder)
            for batch in one.batches:
                predictions += one.measure(objective, batch).predictions
    predictions.sort(key=lambda found: found["position"])
    return predictions, one.summarise({}, predictions), one


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that need no Java, so that they are the same on every machine."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)


@pytest.mark.slow
@pytest.mark.parametrize("search", ["greedy", "beam", "nucleus", "both_ways"])
def test_each_image_once_and_the_same_for_any_ranks_and_batches(data: Path, search: str) -> None:
    weights = ("--task.r2l_weight", "1") if search == "both_ways" else ()
    config, corpus, tokenizer = (
        configured(data, "--task.decoding", search, "--task.max_tokens", "9", *weights),
        Corpus(data / "toy" / "dev"),
        load_tokenizer(data / "tokenizer"),
    )
    objective = built(config, tokenizer)
    expected, values, _ = sweep(config, objective, tokenizer, corpus)
    assert [one["image_id"] for one in expected] == [1000 + number for number in range(IMAGES)]
    assert [one["references"] for one in expected] == [list(captions(number)) for number in range(IMAGES)]
    assert len({one["caption"] for one in expected}) > 1 and all(one["log_probability"] < 0 for one in expected)
    for world, batch in ((2, 4), (4, 1), (1, 9)):
        config.optim.micro_batch_size = batch
        found, again, _ = sweep(config, objective, tokenizer, corpus, world)
        for one, other in zip(found, expected, strict=True):
            assert one["log_probability"] == pytest.approx(other["log_probability"], abs=2e-4)  # rounded to 1e-4
            assert one | {"log_probability": 0} == other | {"log_probability": 0}
        assert again == values


def test_scores_are_those_of_the_metrics_and_of_other_images_references(data: Path, tmp_path: Path) -> None:
    config, corpus, tokenizer = configured(data), Corpus(data / "toy" / "dev"), load_tokenizer(data / "tokenizer")
    predictions, values, one = sweep(config, built(config, tokenizer), tokenizer, corpus, in_training=True)
    for number, prediction in enumerate(predictions):
        prediction["caption"] = captions(number)[0]  # a perfect captioner
    values = one.summarise({}, predictions)
    texts = {number: captions(number)[0] for number in range(IMAGES)}
    references = {number: list(captions(number)) for number in range(IMAGES)}
    expected = caption_scores(texts, references, IN_LOOP)
    assert values["cider_d"] == expected.values["cider_d"] > 1 and values["captions"] == IMAGES
    assert values["cider_d_standard_error"] == expected.standard_errors["cider_d"]
    assert [p["cider_d"] for p in predictions] == pytest.approx(list(expected.per_item["cider_d"].values()), abs=1e-6)
    shifted = {number: references[(number + IMAGES // 2) % IMAGES] for number in range(IMAGES)}
    assert values["cider_d_wrong_image"] == caption_scores(texts, shifted, IN_LOOP).values["cider_d"]
    assert values["cider_d_wrong_image"] < values["cider_d"] / 2
    one.write(tmp_path, predictions)
    assert "not the official PTB tokenization" in (tmp_path / METRICS_NAME).read_text()


def test_scores_of_the_domains_that_images_name(tmp_path: Path, data: Path) -> None:
    """As in nocaps: means of the images' scores, so that of all images is that of the domains by their sizes."""
    domains = ["in-domain", "out-domain", "near-domain"]
    with SplitWriter(tmp_path / "dev", "nocaps", "dev", 1, 5) as writer:
        for number in range(IMAGES):
            meta = {"image_id": number, "domain": domains[number % 2]}
            writer.add(Record(f"k{number}", (png(number),), captions(number), meta, ("png",)))
    config, tokenizer = configured(data), load_tokenizer(data / "tokenizer")
    predictions, _, one = sweep(config, built(config, tokenizer), tokenizer, Corpus(tmp_path / "dev"), in_training=True)
    for number, prediction in enumerate(predictions):
        prediction["caption"] = captions(number)[0] if number % 3 else "a box"
    values = one.summarise({}, predictions)
    for name in domains[:2]:
        scores = [prediction["cider_d"] for prediction in predictions if prediction["domain"] == name]
        assert values[f"cider_d/{name}"] == pytest.approx(sum(scores) / len(scores))
    assert 5 * values["cider_d/in-domain"] + 4 * values["cider_d/out-domain"] == pytest.approx(
        9 * values["cider_d"], abs=1e-5
    )  # predictions are rounded to 6 digits
    assert "cider_d/near-domain" not in values


@pytest.mark.parametrize("search", ["greedy", "beam", "released_beam", "nucleus"])
def test_no_caption_has_fewer_tokens_than_it_must(data: Path, search: str) -> None:
    options = ["--task.decoding", search, "--task.max_tokens", "9", "--task.min_tokens", "6"]
    config, corpus, tokenizer = (
        configured(data, *options),
        Corpus(data / "toy" / "dev"),
        load_tokenizer(data / "tokenizer"),
    )
    objective, found = built(config, tokenizer), []
    with torch.no_grad():
        objective.lm_head.weight[tokenizer.vocabulary.eos_id] *= 3  # an end that comes too soon
        task = CaptioningTask()
        preparation = task.preparation(config, objective, tokenizer)
        one, _ = task.passes(config, objective, preparation, [corpus], EvaluationRanks(Place(0, 1, 0, "single")))
        writer = one.measure.__self__
        for batch in one.batches:
            found += writer._search(decoder_of(objective, batch.images), 9, batch)
    assert len(found) == IMAGES and all(6 <= len(words) <= 9 for words in found)


def test_the_losses_of_all_captions_and_the_protocol(data: Path) -> None:
    config, corpus, tokenizer = configured(data), Corpus(data / "toy" / "dev"), load_tokenizer(data / "tokenizer")
    objective, task = built(config, tokenizer), CaptioningTask()
    preparation = task.preparation(config, objective, tokenizer)
    _, losses = task.passes(config, objective, preparation, [corpus], EvaluationRanks(Place(0, 1, 0, "single")))
    totals = dict.fromkeys(losses.quantities, 0.0)
    for batch in losses.batches:
        for name, value in losses.measure(objective, batch).sums.items():
            totals[name] += float(value)
    texts = [text for number in range(IMAGES) for text in captions(number)]
    assert totals["caption_targets"] == sum(len(tokenizer.encode(text, 50)) - 1 for text in texts)
    assert losses.summarise(totals, [])["loss"] == pytest.approx(totals["caption_loss"] / totals["caption_targets"])
    config.task.decoding = "beam"
    protocol = task.protocol(config)
    assert protocol["decoding"] == {"name": "beam", "beams": 3, "length_penalty": 1.0} == decoding(config.task)
    assert "not the official PTB" in protocol["tokenization"] and protocol["max_tokens"] == 30
    scores = [score.name for score in task.scores(objective)]
    assert scores[:2] == ["cider_d", "loss"]


def test_an_unreadable_image_has_no_caption_and_is_a_hole_of_the_submission(data: Path, tmp_path: Path) -> None:
    corpus = Corpus(write_gallery(tmp_path / "toy" / "dev", IMAGES, broken=(2,)))
    config, tokenizer, task = configured(data), load_tokenizer(data / "tokenizer"), CaptioningTask()
    predictions, values, _ = sweep(config, built(config, tokenizer), tokenizer, corpus)
    assert [one["position"] for one in predictions] == [0, 1, *range(3, IMAGES)] and values["captions"] == IMAGES - 1
    items = [corpus.read_without_images(row) for row in corpus.first_rows().tolist()]
    for one in predictions:
        one["caption"] = one["caption"] or "a"
    with pytest.raises(SubmissionError, match="image_id 1002 has no caption"):
        task.submission(config, predictions, items)
    whole = [*predictions, {"image_id": 1002, "caption": "a box"}]
    found = task.submission(config, whole, items)
    assert [one["image_id"] for one in found] == [1000 + number for number in range(IMAGES)]
    assert found[2] == {"image_id": 1002, "caption": "a box"}


def test_the_prompt_is_read_and_is_no_part_of_a_caption(data: Path) -> None:
    config, corpus, tokenizer = (
        configured(data, "--task.prompt", "a red"),
        Corpus(data / "toy" / "dev"),
        load_tokenizer(data / "tokenizer"),
    )
    objective, task = built(config, tokenizer), CaptioningTask()
    preparation = task.preparation(config, objective, tokenizer)
    [row] = preparation.maker.rows(corpus.read(0), 0, None)
    words = tokenizer.encode("a red", 50)[1:-1]
    assert row.token_ids == tokenizer.encode(f"a red {captions(0)[0]}", 50)
    batch = collate([Item("k", [row])], torch.zeros((1, 1, 3, 32, 32), dtype=torch.uint8), preparation.planner, [0])
    assert batch.terms["caption"].target.tolist() == row.token_ids[1 + len(words) :]
    predictions, _, _ = sweep(config, objective, tokenizer, corpus)
    plain, _, _ = sweep(configured(data), objective, tokenizer, corpus)
    assert [one["caption"] for one in predictions] != [one["caption"] for one in plain]
    assert not any(one["caption"].startswith("a red") for one in predictions)
    with pytest.raises(ConfigError, match="task.prompt 'a red ': its tokens change"):
        task.preparation(configured(data, "--task.prompt", "a red "), objective, tokenizer)


def test_captions_in_the_released_form(data: Path) -> None:
    config, corpus = configured(data, "--model.behaviour", "released"), Corpus(data / "toy" / "dev")
    tokenizer = load_tokenizer(data / "tokenizer")
    size = tokenizer.vocabulary.size
    objective = built(config, tokenizer)
    [row] = CaptioningTask().preparation(config, objective, tokenizer).maker.rows(corpus.read(0), 0, None)
    text = f"{captions(0)[0]}."
    assert row.token_ids == [0, size, *tokenizer.encode(text, 50)[1:-1], size + 1, tokenizer.vocabulary.eos_id]
    assert objective.lm_head.weight.shape[0] == size + 2
    predictions, _, _ = sweep(config, objective, tokenizer, corpus)
    assert len(predictions) == IMAGES


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_builds_the_same_captioner(data: Path, name: str) -> None:
    config, tokenizer = configured(data, "--objective.name", name), load_tokenizer(data / "tokenizer")
    names = {name for name, _ in built(config, tokenizer).named_parameters()}
    assert names == {name for name, _ in built(configured(data), tokenizer).named_parameters()}


def test_rewards_are_cider_d_by_frequencies_of_the_training_captions_with_the_end_as_a_word(data: Path) -> None:
    config, tokenizer = configured(data, "--task.self_critical", "true"), load_tokenizer(data / "tokenizer")
    references = [[plain_words(text) for text in captions(number)] for number in range(IMAGES)]
    frequencies = DocumentFrequencies.of(references, end=True)
    assert document_frequencies(config) == frequencies
    reward, ids = CiderReward(config, tokenizer), lambda text: tokenizer.encode(text, 100)[1:]
    texts = [captions(number)[0] for number in range(4)]
    wanted = [[ids(text) for text in captions(number)] for number in range(4)]
    found = reward([ids(text) for text in texts], wanted)
    assert found == pytest.approx(cider_scores([plain_words(t) for t in texts], references[:4], frequencies), abs=1e-9)
    cut = reward([ids(text)[:-1] for text in texts], wanted)
    assert all(one < other for one, other in zip(cut, found)), "a caption that does not end is worth less"


def test_a_self_critical_step_and_its_evaluation(data: Path) -> None:
    config, corpus = configured(data, "--task.self_critical", "true"), Corpus(data / "toy" / "dev")
    tokenizer = load_tokenizer(data / "tokenizer")
    objective, task = built(config, tokenizer), CaptioningTask()
    preparation = task.preparation(config, objective, tokenizer)
    assert objective.term_weights == {"self_critical": 1.0}
    items = [Item(f"k{n}", preparation.maker.rows(corpus.read(int(corpus.first_rows()[n])), n, None)) for n in (1, 2)]
    images = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    batch = collate(items, images, preparation.planner, [0, 1])
    loss = objective(batch)["self_critical"]
    loss.backward()
    assert batch.counts == {"self_critical": 2} and loss.isfinite()
    assert objective.net.vision.patch_embedding.weight.grad is not None
    predictions, values, _ = sweep(config, objective, tokenizer, corpus)
    assert len(predictions) == IMAGES and "cider_d" in values


def test_frequencies_without_the_end_of_captions_are_refused(data: Path, tmp_path: Path) -> None:
    DocumentFrequencies.of([[["a", "box"]]], end=False).save(tmp_path / "df.json")
    config = configured(data, "--task.document_frequencies", str(tmp_path / "df.json"))
    with pytest.raises(ValueError, match="counts captions without their end"):
        document_frequencies(config)


def test_more_tokens_than_a_caption_may_have_are_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="task.min_tokens is 10, expected at most task.max_tokens"):
        configured(data, "--task.min_tokens", "10", "--task.max_tokens", "9")
    config, tokenizer = configured(data, "--task.min_tokens", "29"), load_tokenizer(data / "tokenizer")
    config.data.max_text_length = 20
    objective = built(config, tokenizer)
    with pytest.raises(ConfigError, match="task.min_tokens 29 is more than the 18 tokens that a caption may have"):
        sweep(config, objective, tokenizer, Corpus(data / "toy" / "dev"))


def test_both_ways_takes_the_beam_that_the_weights_say_and_is_in_the_protocol(data: Path) -> None:
    """The scored captions are those of the search itself; the reverse stream's loss is measured beside the other."""
    options = ["--task.decoding", "both_ways", "--task.max_tokens", "9", "--task.prompt", "a red", "--task.beams", "5"]
    options += ["--task.r2l_weight", "1", "--task.reconstruction_weight", "0.5", "--task.l2r_score_weight", "0.5"]
    config, corpus = configured(data, *options), Corpus(data / "toy" / "dev")
    config.task.reconstruction_score_weight = 2.0
    tokenizer, task = load_tokenizer(data / "tokenizer"), CaptioningTask()
    objective = built(config, tokenizer)
    found, _, _ = sweep(config, objective, tokenizer, corpus)
    preparation = task.preparation(config, objective, tokenizer)
    one, losses = task.passes(config, objective, preparation, [corpus], EvaluationRanks(Place(0, 1, 0, "single")))
    expected = []
    with torch.no_grad():
        for batch in one.batches:
            tokens, prompt = objective.net.encode(batch.images), prompt_words(config, tokenizer)
            decoder = decoder_of(objective, batch.images, prompt)
            chosen = both_ways(objective, decoder, tokens, 9, 5, 1.0, ScoreWeights(0.5, 1, 2))
            expected += [clean_caption(tokenizer.decode(words[len(prompt) :]), False) for words in chosen]
        measured = losses.measure(objective, next(iter(losses.batches))).sums
    assert [one["caption"] for one in found] == expected
    assert {"caption_loss", "r2l_loss", "flm_loss"} <= set(measured)
    assert {"r2l_loss", "flm_accuracy"} <= {score.name for score in task.scores(objective)}
    assert task.protocol(config)["decoding"] == {
        **{"name": "both_ways", "beams": 5, "length_penalty": 1.0},
        **{"l2r_score_weight": 0.5, "r2l_score_weight": 1.0, "reconstruction_score_weight": 2.0},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--task.decoding", "both_ways"],
            "greedy, beam or nucleus, as task.r2l_weight 0 .* give --task.r2l_weight 1 too",
        ),
        (["--task.reconstruction_weight", "1"], "task.reconstruction_weight is 1.0, expected 0 with task.r2l_weight 0"),
    ],
)
def test_directions_that_are_not_trained_are_refused(data: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(data, *options)


def test_scoring_by_a_reconstructor_that_is_not_there_is_refused(data: Path) -> None:
    options = ["--task.decoding", "both_ways", "--task.r2l_weight", "1", "--task.reconstruction_score_weight", "1"]
    config, tokenizer = configured(data, *options), load_tokenizer(data / "tokenizer")
    with pytest.raises(ValueError, match="reconstruction_score_weight is 1, .* has no reconstructor; use 0"):
        sweep(config, built(config, tokenizer), tokenizer, Corpus(data / "toy" / "dev"))
