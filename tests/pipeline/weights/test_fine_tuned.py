"""Heads and their weights: from pretraining, from a fine-tuned release, from a run of ours; whole, for evaluation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.build import build_captioning, build_classification, build_objective
from model.config import Vocabulary, objective_options
from model.heads import MatchingHead, RankHead
from model.weights.heads import head_rules
from model.weights.released import from_released, read_layout
from model.weights.start import start_from
from pipeline.config.command_line import parse_command_line
from pipeline.convert import main
from pipeline.weights.sources import import_config, is_import, load_model, load_whole
from pipeline.weights.starting import load_trained
from tests.model.weights.test_released import LENGTH
from tests.model.weights.test_released_tasks import VOCABULARY, fine_tuned_state
from tests.oracle import oracle_file

LISTED = {"vqa": "vqa_train", "nlvr2": "nlvr2_train", "captioning": "caption_train", "retrieval": "irtr_f30k_train"}
FILE = "weights.safetensors"


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an import of each task's released checkpoint, by name, and of a pretrained one."""
    root = tmp_path_factory.mktemp("imports")
    for task in (*LISTED, "pretraining"):
        torch.save({"state_dict": fine_tuned_state(task)}, root / "released.ckpt")
        assert main(["import-flm", str(root / "released.ckpt"), str(root / task), "--text-heads", "4"]) == 0
    return root


def classification(folder: Path, task: str = "vqa", num_classes: int = 11, num_images: int = 1) -> nn.Module:
    """On the network of the import, random."""
    torch.manual_seed(0)
    options = import_config(folder).model, objective_options(), VOCABULARY, LENGTH
    return build_classification(*options, task, num_classes, num_images)


def heads_of(names: list[str]) -> list[str]:
    return sorted({name for name in names if not name.startswith("net.")})


@pytest.mark.slow
@pytest.mark.parametrize("task", LISTED)
def test_tiny_layouts_are_those_of_the_release(task: str) -> None:
    listed = json.loads(oracle_file("g_checkpoint_keys.json").read_text())[LISTED[task]]["keys"]
    every_layer = lambda keys: {re.sub(r"\d+", "N", key) for key in keys}  # noqa: E731
    assert every_layer(fine_tuned_state(task)) == every_layer(key for key, *_ in listed)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "num_classes", "num_images"), [("vqa", 3129, 1), ("nlvr2", 2, 2)])
def test_real_sizes_are_those_of_the_release(task: str, num_classes: int, num_images: int) -> None:
    """Network and head have the names and shapes of what is imported, none more and none less."""
    listed = json.loads(oracle_file("g_checkpoint_keys.json").read_text())[LISTED[task]]["keys"]
    state = {key: torch.zeros(()).expand(shape) for key, shape, *_ in listed}
    layout = read_layout(state)
    weights, _ = from_released(state, layout)
    vocabulary = Vocabulary(50265, bos_id=0, pad_id=1, eos_id=2, mask_id=50264)
    with torch.device("meta"):
        built = build_classification(layout.model, objective_options(), vocabulary, 50, task, num_classes, num_images)
    found = start_from(built, weights, head_rules(weights))
    assert len(found.loaded) == len(weights) and not found.resized


@pytest.mark.slow
@pytest.mark.parametrize("task", [*LISTED, "pretraining"])
def test_every_key_of_a_fine_tuned_release_is_accounted_for(imports: Path, task: str) -> None:
    state, report = fine_tuned_state(task), json.loads((imports / task / "import.json").read_text())
    used = [key for keys in report["used"].values() for key in keys]
    assert sorted([*used, *report["aliased"], *report["dead"]]) == sorted(state)
    assert main(["export-flm", str(imports / task), str(imports / f"{task}.back")]) == 0
    back = torch.load(imports / f"{task}.back", weights_only=True)["state_dict"]
    assert set(back) == set(state) - set(report["dead"])
    assert all(torch.equal(value, state[name]) for name, value in back.items())
    (imports / f"{task}.back").unlink()
    config = parse_command_line(["--recipe", str(imports / task / "recipe.yaml")]).config
    assert (config.task.name, config.model.behaviour, config.model.weights) == (task, "released", str(imports / task))


@pytest.mark.parametrize(
    ("task", "head", "released", "num_classes", "num_images"),
    [("vqa", "answer_head", "vqa_classifier", 11, 1), ("nlvr2", "pair_head", "nlvr2_classifier", 2, 2)],
)
def test_a_fine_tuned_release_is_used_as_it_is(
    imports: Path, task: str, head: str, released: str, num_classes: int, num_images: int
) -> None:
    """Every tensor of network and head; the folder may have been moved."""
    folder, state = (imports / task).rename(imports / "moved"), fine_tuned_state(task)
    config = import_config(folder)
    assert is_import(folder) and config.model.weights == str(folder) and config.task.name == task
    built = classification(folder, task, num_classes, num_images)
    load_trained(built, config.model, folder)
    folder.rename(imports / task)
    weights = load_file(imports / task / FILE)
    for name, value in built.named_parameters():
        theirs = state[name.replace(head, released)] if name.startswith(head) else weights[name]
        assert torch.equal(value, theirs), name
    types = state["token_type_embeddings.weight"]
    assert torch.equal(built.net.type_embedding.weight, types) and len(types) == 1 + num_images


def test_what_evaluation_needs_must_be_there(imports: Path) -> None:
    for folder in ("pretraining", "nlvr2"):
        with pytest.raises(ValueError, match=r"model.weights .*weights lack answer_head\.0\.weight"):
            load_whole(classification(imports / folder), str(imports / folder))
    with pytest.raises(ValueError, match=r"vqa_classifier\.3\.weight has shape \(11, 128\), .*\(12, 128\)"):
        load_whole(classification(imports / "vqa", num_classes=12), str(imports / "vqa"))


def test_fine_tuning_begins_with_a_fresh_head_or_the_same_tasks(imports: Path) -> None:
    def started(folder: str, **sizes: int) -> tuple[list[str], list[str], list[str]]:
        """Heads that were loaded, fresh, dropped."""
        built = classification(imports / folder, **sizes)
        before = {name: value.clone() for name, value in built.named_parameters()}
        found = load_model(built, str(imports / folder))
        own = dict(built.named_parameters())
        assert all(torch.equal(own[name], before[name]) for name in found.fresh)
        assert {*found.loaded, *found.fresh} == {*own}
        return heads_of(found.loaded), heads_of(found.fresh), heads_of(found.dropped)

    head = [f"answer_head.{part}.{kind}" for part in (0, 1, 3) for kind in ("bias", "weight")]
    loaded, fresh, dropped = started("pretraining")
    assert (loaded, fresh) == ([], head) and len(dropped) == 6 and all(name.startswith("lm_head") for name in dropped)
    assert started("vqa") == (head, [], [])
    other_answers = [f"task.vqa_classifier.3.{kind}" for kind in ("bias", "weight")]
    assert started("vqa", num_classes=12) == (head[:4], head[4:], other_answers)
    assert started("nlvr2")[:2] == ([], head)


def test_language_model_and_further_images_start_from_what_is_there(imports: Path) -> None:
    """Pretraining goes on from VQA with a fresh vocabulary head; NLVR2's second image begins as the first."""
    options = import_config(imports / "vqa").model, objective_options(), VOCABULARY, LENGTH
    found = load_model(build_objective(*options), str(imports / "vqa"))
    assert len(found.fresh) == 6 and all(name.startswith("lm_head") for name in found.fresh)
    built = classification(imports / "pretraining", "nlvr2", 2, num_images=3)
    found = load_model(built, str(imports / "pretraining"))
    assert found.resized == ["net.type_embedding.weight"]
    types = built.net.type_embedding.weight
    assert torch.equal(types[1], types[2]) and torch.equal(types[1], types[3]) and not torch.equal(*types[:2])


class Ranks(nn.Module):
    """A rank head and the one of image-text matching."""

    def __init__(self, released: bool) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.released = released
        self.rank_head, self.itm_head = RankHead(4), MatchingHead(4)


def matching(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.weight": torch.tensor([[1.0, 2, 3, 4], [7, 5, 3, 2]]), f"{prefix}.bias": torch.tensor([1.0, 3])}


@pytest.mark.parametrize("prefix", ["itm_head", "task.itm_score.fc"])
def test_a_rank_head_starts_from_image_text_matching(tmp_path: Path, prefix: str) -> None:
    """From the row of a match in released behaviour; by default it ranks as the log odds of a match do."""
    save_file(matching(prefix), tmp_path / FILE)
    for released, weight, bias in ((True, [7, 5, 3, 2], 3), (False, [6, 3, 0, -2], 2)):
        built = Ranks(released)
        found = load_whole(built, str(tmp_path))
        assert built.rank_head.weight.tolist() == [weight] and built.rank_head.bias.tolist() == [bias]
        assert torch.equal(built.itm_head.weight, matching("")[".weight"])
        assert found.resized == ["rank_head.weight", "rank_head.bias"] and not found.fresh and not found.dropped


@pytest.mark.parametrize("own", ["rank_head", "task.rank_output"])
def test_a_rank_head_of_the_source_comes_first(tmp_path: Path, own: str) -> None:
    ranks = {f"{own}.weight": torch.ones(1, 4), f"{own}.bias": torch.ones(1)}
    save_file(matching("task.itm_score.fc") | ranks, tmp_path / FILE)
    built = Ranks(released=True)
    found = load_whole(built, str(tmp_path))
    assert built.rank_head.weight.tolist() == [[1] * 4] and found.resized == []


def test_retrieval_of_the_release_has_its_rank_head(imports: Path) -> None:
    built = build_objective(import_config(imports / "pretraining").model, objective_options(), VOCABULARY, LENGTH)
    del built.lm_head
    built.rank_head = RankHead(64)
    found = load_whole(built, str(imports / "retrieval"))
    assert torch.equal(built.rank_head.weight, fine_tuned_state("retrieval")["rank_output.weight"])
    unread = [f"task.{name}.fc.{kind}" for name in ("itm_score", "itm_score_flm") for kind in ("bias", "weight")]
    assert found.dropped == unread


def test_captioning_of_the_release_grows_the_vocabulary_by_two(imports: Path) -> None:
    """From pretraining, whose rows stay, and from captioning as it is; the default reads pretraining without growth."""
    config = import_config(imports / "pretraining").model
    tail = (objective_options(), VOCABULARY, LENGTH)
    built, grown = build_captioning(config, *tail), ["net.embedding.word.weight", "lm_head.weight", "lm_head.bias"]
    assert load_model(built, str(imports / "pretraining")).resized == grown
    state = load_file(imports / "pretraining" / FILE)
    for name in grown:
        assert len(built.get_parameter(name)) == 294 and torch.equal(built.get_parameter(name)[:292], state[name])
    with pytest.raises(ValueError, match=r"shape \(292, 64\), .* \(294, 64\)"):
        load_whole(build_captioning(config, *tail), str(imports / "pretraining"))
    found = load_whole(built, str(imports / "captioning"))
    assert len(found.loaded) == len(load_file(imports / "captioning" / FILE)) and not found.resized
    config.behaviour = "default"
    found = load_model(build_captioning(config, *tail), str(imports / "pretraining"))
    left_out = [name for name in found.dropped if not re.match(r"net\.(stream_embedding|reconstructor_)", name)]
    assert not found.fresh and not found.resized and not left_out


class Grown(nn.Module):
    """A vocabulary of two more tokens than its source, and nothing of the source's second part."""

    not_read = (r"net\.left_out\..+",)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.word = nn.Embedding(5, 2)
        added = lambda table, shape: torch.cat([table, torch.zeros(shape[0] - len(table), 2)])  # noqa: E731
        self.resizes = ((r"net\.word\.weight", added),)


def test_an_objective_may_grow_tables_and_leave_parts_out(tmp_path: Path) -> None:
    save_file({"net.word.weight": torch.ones(3, 2), "net.left_out.weight": torch.ones(1)}, tmp_path / FILE)
    built = Grown()
    found = load_model(built, str(tmp_path))
    assert built.net.word.weight.tolist() == [[1, 1]] * 3 + [[0, 0]] * 2
    assert (found.resized, found.dropped) == (["net.word.weight"], ["net.left_out.weight"])
    built.resizes, built.not_read = (), ()
    with pytest.raises(ValueError, match=r"shape \(3, 2\), .* \(5, 2\).*no place for net\.left_out\.weight"):
        load_model(built, str(tmp_path))
