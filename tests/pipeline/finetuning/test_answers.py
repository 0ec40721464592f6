"""Questions answered by EVLGen in words, GQA and OK-VQA: rows, answers, scores."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_prep.record import Record
from data_prep.vqa_answers import normalise, vocabulary_file
from model.batch import Row
from model.language.text_form import QUESTION
from model.plans.language import LanguagePlanner
from pipeline.config.command_line import parse_command_line
from pipeline.config.options import Config, ConfigError
from pipeline.config.task_options import task_options
from pipeline.data.shard_reader import RawSample
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.distributed.places import Place
from pipeline.finetuning.table import task_of
from pipeline.loading.open_data import open_held_out
from pipeline.metrics.submissions import SubmissionError
from pipeline.metrics.vqa import accuracy
from pipeline.tasks.task import EvaluationRanks
from pipeline.tasks.written_answers import AnswerRows, released_question
from tests.oracle import load_oracle, oracle_file
from tests.pipeline.data.test_reader import jpeg, write_split
from tests.pipeline.finetuning.test_classification import ANSWERS, config_of, evaluated, vqa_record
from tests.tiny_frozen_parts import write_language_model

WORDS = ("is it red", "what is to be seen on the left", "why", "how many")
TYPES = ("verify", "query", "choose")


def gqa_record(number: int, answered: bool = True) -> Record:
    questions = tuple(f"{WORDS[(number + n) % 4]} {n}?" for n in range(number % 3 + 1))
    meta: dict[str, Any] = {"question_id": [f"{number}0{n}" for n in range(len(questions))]}
    if answered:
        meta["answers"] = [[ANSWERS[(number + n) % 4]] * 10 for n in range(len(questions))]
        meta["structural"] = [TYPES[n % 3] for n in range(len(questions))]
        meta["semantic"] = ["obj"] * len(questions)
    return Record(f"g{number:03d}", (jpeg(number),), questions, meta, ("jpg",))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_split(folder / "vqa" / "dev", [vqa_record(number) for number in range(7)])
    write_split(folder / "gqa" / "dev", [gqa_record(number) for number in range(7)])
    write_language_model(folder / "llm", "opt")
    return folder


def configured(data: Path, task: str, *more: str) -> Config:
    words = ["--recipe", "evlgen_tiny", "--data", str(data / ("gqa" if task == "gqa" else "vqa")), "--output", "run"]
    words += ["--model.language.name", str(data / "llm"), "--task.name", task, "--train.eval_samples", "null"]
    return parse_command_line([*words, "--data.max_text_length", "60", *more]).config


def built(config: Config) -> tuple[nn.Module, TextTokenizer]:
    """A random EVLGen whose answers hang on image and question."""
    tokenizer = load_tokenizer(config.model.language.name, of_language_model=True)
    torch.manual_seed(5)
    objective = task_of(config).build(config, tokenizer.vocabulary).eval()
    with torch.no_grad():
        for parameter in objective.net.language.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return objective, tokenizer


def swept(config: Config, objective: nn.Module, tokenizer: TextTokenizer, world: int = 1) -> tuple[list[dict], dict]:
    """Predictions of all ranks in order, and what they come to."""
    task, predictions = task_of(config), []
    preparation, totals = task.preparation(config, objective, tokenizer), {"caption_loss": 0.0, "targets": 0.0}
    for rank in range(world):
        ranks = EvaluationRanks(Place(rank, world, rank, "environment"))
        (one,) = task.passes(config, objective, preparation, open_held_out(config, texts="captions"), ranks)
        with torch.no_grad():
            one.measure(objective, one.placeholder)
            for batch in one.batches:
                measured = one.measure(objective, batch)
                predictions += measured.predictions
                for name, value in measured.sums.items():
                    totals[name] += float(value)
    predictions.sort(key=lambda found: found["position"])
    return predictions, one.summarise(totals, predictions)


def rows_of(config: Config, text: str, meta: dict[str, Any]) -> tuple[list[Row], AnswerRows, nn.Module]:
    objective, tokenizer = built(config)
    preparation = task_of(config).preparation(config, objective, tokenizer)
    return preparation.maker.rows(RawSample("k", [], text, meta), 7, None), preparation.maker, objective


META = {"question_id": [1], "answers": [["Two dogs."] * 10]}


@pytest.mark.parametrize("cleaned", [False, True])
def test_a_question_is_asked_as_its_language_model_is_asked(data: Path, cleaned: bool) -> None:
    """Read up to "answer:", the answer and its end predicted; in released behaviour the question loses its marks."""
    behaviour = "released" if cleaned else "default"
    config = configured(data, "vqa", "--model.behaviour", behaviour)
    (row,), maker, objective = rows_of(config, 'How  MANY "dogs"?', META)
    asked = "how many dogs?" if cleaned else 'How MANY "dogs"?'
    assert QUESTION == "Question: {} Short answer:"
    decode, form = maker.tokenizer._engine.decode, objective.form
    assert decode(row.token_ids[len(form.begin) : row.target]) == f"Question: {asked} Short answer:"
    assert decode(row.token_ids[row.target : -1]) == " 2 dogs" and row.token_ids[-1:] == list(form.end)
    batch = objective.planner(torch.zeros(1, 1, 3, 32, 32, dtype=torch.uint8), [row])
    assert batch.terms["caption"].target.tolist() == row.token_ids[row.target :]


def test_too_long_a_question_loses_words_and_in_released_behaviour_the_end_of_the_prompt(data: Path) -> None:
    """There it is cut to 32 tokens with the one that begins it; each letter is a token here."""
    long = "is there a dog near the house on the hill"
    for behaviour, kept in (("default", "Question: is Short answer:"), ("released", "Question: is there a dog near t")):
        config = configured(data, "vqa", "--model.behaviour", behaviour, "--data.max_text_length", "32")
        (row,), maker, objective = rows_of(config, long, META)
        assert row.target <= 32
        assert maker.tokenizer._engine.decode(row.token_ids[len(objective.form.begin) : row.target]) == kept


def test_the_questions_of_the_release() -> None:
    """Ten marks go, "?" and others stay; 50 words."""
    assert released_question('Is it "A.B" (No: 1)?! #2 *; ~') == "is it ab no 1? 2"
    assert released_question("what's on the man's t-shirt, left?") == "what's on the man's t-shirt, left?"
    assert released_question("word " * 70) == " ".join(["word"] * 50)


def test_what_is_read_of_a_question_is_what_the_release_reads() -> None:
    """With the toy tokenizer of its dumps: the embeddings that stand before the answer, 32 tokens at most."""
    dump = load_oracle("11_evlgen_opt_image.pt", "evlgen")
    tokenizer = load_tokenizer(oracle_file("tokenizer_opt_tiny/vocab.json", "evlgen").parent, of_language_model=True)
    settings = {"prompt": QUESTION, "cuts_prompt": True, "clean": released_question}
    maker = AnswerRows(tokenizer, (2,), (14,), 32, 10, lambda sample: {}, **settings)
    table = dump["state_dict"]["opt_model.model.decoder.embed_tokens.weight"]
    embeddings = dump["generation"]["vqa_beams1"]["prefix_embeds"]
    for question, expected in zip(dump["questions"], embeddings, strict=True):
        (row,) = maker.rows(RawSample("k", [], question, {}), 0, None)
        read = table[[2, *row.note["_question"]]]
        assert torch.equal(read, expected[-len(read) :]) and len(read) == 32


def test_a_prompt_of_ones_own(data: Path) -> None:
    config = configured(data, "vqa", "--task.question_prompt", "Q {} A")
    (row,), maker, objective = rows_of(config, "why?", META)
    assert maker.tokenizer._engine.decode(row.token_ids[1 : row.target]) == "Q why? A"


@pytest.mark.parametrize("search", ["greedy", "beam", "released_beam"])
@pytest.mark.slow
def test_answers_are_the_same_in_every_batch(data: Path, search: str) -> None:
    """Whatever questions of other lengths share one, on any number of ranks."""
    more = ["--task.decoding", search, "--task.max_answer_tokens", "6"]
    more += [] if search == "greedy" else ["--task.length_penalty", "2", "--task.beams", "5"]
    config = configured(data, "gqa", *more)
    objective, tokenizer = built(config)
    expected, values = swept(config, objective, tokenizer)
    assert [one["question_id"] for one in expected] == [f"{n}0{k}" for n in range(7) for k in range(n % 3 + 1)]
    assert len({one["answer"] for one in expected}) > 1 and values["loss"] > 0
    for world, batch in ((2, 3), (1, 1), (1, 20)):
        config.optim.micro_batch_size = batch
        found, again = swept(config, objective, tokenizer, world)
        assert found == expected
        assert again == pytest.approx(values, rel=1e-5)  # sums of fp32 losses in another order


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 5])
def test_answers_are_those_of_generate_of_transformers(data: Path, beams: int) -> None:
    """Each question by itself, from the same embeddings, with length penalty 0: there all versions agree."""
    search = ["--task.decoding", "greedy" if beams == 1 else "released_beam", "--task.beams", str(beams)]
    config = configured(data, "vqa", *search, "--task.length_penalty", "0")
    objective, tokenizer = built(config)
    found, _ = swept(config, objective, tokenizer)
    preparation = task_of(config).preparation(config, objective, tokenizer)
    ranks, answers, net = EvaluationRanks(Place(0, 1, 0, "single")), [], objective.net
    (one,) = task_of(config).passes(config, objective, preparation, open_held_out(config, texts="captions"), ranks)
    with torch.no_grad():
        for batch in one.batches:
            for number, note in enumerate(batch.notes):
                ids = torch.tensor([[*net.form.begin, *note["_question"]]])
                image = net.prefix(net.encode(batch.images[number : number + 1]))
                inputs = torch.cat([image, net.language.embed(ids)], dim=1)
                (row,) = net.language.llm.generate(
                    inputs_embeds=inputs,
                    attention_mask=torch.ones(inputs.shape[:2], dtype=torch.int64),
                    **{"max_new_tokens": 10, "num_beams": beams, "length_penalty": 0.0, "do_sample": False},
                    **{"eos_token_id": net.form.end[0], "pad_token_id": net.form.end[0]},
                ).tolist()
                end = row.index(net.form.end[0]) if net.form.end[0] in row else len(row)
                answers.append(" ".join(tokenizer.decode(row[:end]).split()))
    assert [one["answer"] for one in found] == answers and any(answers)


def test_an_image_is_encoded_once_for_the_questions_beside_each_other(data: Path) -> None:
    objective, _ = built(configured(data, "vqa"))
    pictures = torch.randint(0, 256, (3, 1, 3, 32, 32), dtype=torch.uint8)
    repeated, seen = pictures[[0, 0, 1, 2, 2, 2, 0]], []
    objective.net.vision.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with torch.no_grad():
        found, expected = objective.net.encode_each_once(repeated), objective.net.encode(pictures)
    torch.testing.assert_close(found, expected[[0, 0, 1, 2, 2, 2, 0]], rtol=0, atol=1e-5)  # of size 1
    assert seen == [4, 3]


def test_questions_of_one_image_are_learned_as_one_by_one(data: Path) -> None:
    """They stand behind its tokens once; only their answers have a loss."""
    config = configured(data, "vqa")
    objective, tokenizer = built(config)
    maker = task_of(config).preparation(config, objective, tokenizer).maker
    images = torch.randint(0, 256, (1, 1, 3, 32, 32), dtype=torch.uint8)
    sample = RawSample("k", [], "", {"question_id": [1, 2, 3], "answers": [["yes"] * 10, ["two"] * 10, ["no"] * 10]})
    rows = [
        maker.rows(sample._replace(text=text, number=number), number, None)[0]
        for number, text in enumerate(("is it red?", "how many?", "why not there?"))
    ]
    planner: LanguagePlanner = objective.planner
    with torch.no_grad():
        together = objective(planner(images, rows))["caption"]
        apart = sum(objective(planner(images, [row]))["caption"] for row in rows)
    assert float(together) == pytest.approx(float(apart), rel=1e-6)  # logits are fp32
    targets = planner(images, rows).terms["caption"].target.tolist()
    assert tokenizer._engine.decode(targets) == " yes\n 2\n no\n"


@pytest.mark.parametrize(
    ("task", "more", "error"),
    [
        ("vqa", ["--task.question_prompt", "Q" * 80 + "{}"], "leaves no word of a question in data.max_text_length 60"),
        ("vqa", ["--task.max_answer_tokens", "90"], "the language model has 128; lower one of them"),
    ],
)
def test_what_leaves_no_room_is_refused(data: Path, task: str, more: list[str], error: str) -> None:
    config = configured(data, task, *more)
    with pytest.raises(ConfigError, match=error):
        task_of(config).preparation(config, *built(config))


def test_options_that_would_be_idle_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "vqa", [vqa_record(1)])
    config.task.question_prompt = "Q {}"
    with pytest.raises(ConfigError, match="task.question_prompt 'Q {}' has no effect where answers are chosen"):
        evaluated(config)
    config.task.generative, config.task.decoding = True, "beam"
    with pytest.raises(ConfigError, match="task.decoding beam of answers is for objective.name evlgen"):
        evaluated(config)
    for words, error in (
        ({"question_prompt": "Q"}, "a text that holds {} once"),
        ({"decoding": "nucleus"}, "greedy"),
        ({"repetition_penalty": 1.5, "decoding": "nucleus"}, "greedy, beam or released_beam"),
    ):
        with pytest.raises(ValueError, match=error):
            task_options("gqa", **words).check()


def test_a_text_tower_reads_a_prompt_too(tmp_path: Path) -> None:
    config = config_of(tmp_path, "vqa", [vqa_record(1)])
    config.task.generative, config.task.question_prompt, config.data.max_text_length = True, "word {}", 36
    _, found, _ = evaluated(config)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert found and all("_question" in one and tokenizer.decode(one["_question"]).startswith("word") for one in found)


def gqa_config(folder: Path, records: list[Record]) -> Config:
    config = config_of(folder, "vqa", records)
    return dataclasses.replace(config, task=task_options("gqa"))


def test_gqa_counts_what_the_prediction_is_once_normalised(tmp_path: Path) -> None:
    """A classifier of a text tower, with each question's accuracy by a loop of its own."""
    config = gqa_config(tmp_path, [gqa_record(number) for number in range(7)])
    values, found, _ = evaluated(config)
    assert [one["score"] for one in found] == [float(normalise(one["answer"]) == one["answers"][0]) for one in found]
    assert values["accuracy"] == pytest.approx(sum(one["score"] for one in found) / len(found))
    assert values["questions"] == len(found) == 13 and all(len(one["answers"]) == 1 for one in found)
    for kind in ("structural", "semantic"):
        for name in {one[kind] for one in found}:
            scores = [one["score"] for one in found if one[kind] == name]
            assert values[f"accuracy/{kind}/{name}"] == pytest.approx(sum(scores) / len(scores))
    assert 0 < values["accuracy"] < 1 and "accuracy_standard_error" in values


def test_gqa_is_trained_on_its_one_answer(tmp_path: Path) -> None:
    """As a soft target of 1, though predictions repeat it once."""
    config = gqa_config(tmp_path, [gqa_record(2)])
    _, _, objective = evaluated(config)
    preparation = task_of(config).preparation(config, objective, load_tokenizer(tmp_path / "tokenizer"))
    rows = preparation.maker.rows(
        RawSample("k", [], "why?", {"question_id": ["7"], "answers": [["red"] * 10]}), 0, None
    )
    assert rows[0].target == [(ANSWERS.index("red"), 1.0)]


def test_the_results_file_of_gqa(tmp_path: Path) -> None:
    config = gqa_config(tmp_path, [gqa_record(number, answered=False) for number in range(3)])
    values, found, _ = evaluated(config)
    assert "accuracy" not in values
    items = [RawSample("k", [], "", {"question_id": [one["question_id"]]}) for one in found]
    content = task_of(config).submission(config, found, items)
    assert content[0] == {"questionId": found[0]["question_id"], "prediction": found[0]["answer"]}
    with pytest.raises(SubmissionError, match="questionId 202 has no prediction: the file has a hole"):
        task_of(config).submission(config, found[:-1], items)
    with pytest.raises(SubmissionError, match="questionId 7 is int, expected str"):
        task_of(config).submission(config, [found[0] | {"question_id": 7}], items)


def test_okvqa_is_scored_as_vqa_by_kind_of_knowledge(tmp_path: Path) -> None:
    record = vqa_record(3)
    meta = record.meta | {"question_type": ["Sports", "Animals", "Sports", "Animals"]}
    config = config_of(tmp_path, "vqa", [dataclasses.replace(record, meta=meta)])
    config = dataclasses.replace(config, task=task_options("okvqa"))
    values, found, _ = evaluated(config)
    scores = {one["question"]: accuracy(one["answer"], one["answers"]) for one in found}
    assert values["vqa_accuracy"] == pytest.approx(sum(scores.values()) / 4)
    sports = [scores[one["question"]] for one in found if one["question_type"] == "Sports"]
    assert values["vqa_accuracy/Sports"] == pytest.approx(sum(sports) / 2) and "vqa_accuracy/Animals" in values


def test_every_set_of_questions_has_the_list_of_answers_of_its_own_run(tmp_path: Path) -> None:
    config = gqa_config(tmp_path, [gqa_record(2)])
    before = task_of(config).fingerprint(config)
    (tmp_path / "answers.json").write_text(json.dumps(vocabulary_file([("left", 9), ("right", 9)], ["train"])))
    assert task_of(config).fingerprint(config) != before
