"""What a fresh run starts from: the paper's weights where they can be had and fit, decided once, alike on all ranks."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.build import build_objective
from model.config import FLMOptions, ModelConfig
from model.torchvision_shim import ensure_torchvision
from pipeline.config.options import ConfigError
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.distributed.places import Place
from pipeline.distributed.ranks import Agreement
from pipeline.weights import starting as starting_weights
from pipeline.weights.hub import HubError
from pipeline.weights.starting import describe_start, load_starting_weights
from tests.forked_ranks import run_ranks
from tests.model.weights.test_towers import save_text_model
from tests.pipeline.data.test_tokenizer import write_tokenizer
from tests.pipeline.engine.test_engine import make_engine
from tests.pipeline.engine.test_engine import tiny_config as engine_config
from tests.program.test_program import SHORT, finish, losses, program, work  # noqa: F401 (a fixture)
from tests.tiny_flm import tiny_config

CLIP, ROBERTA = "somebody/tiny-clip", "roberta-base"
ALONE = Place(0, 1, 0, "single")


class FakeHub:
    """Folders by repository; one that is not among them can't be had."""

    def __init__(self, **folders: Path) -> None:
        self.folders, self.asked = {CLIP: folders.get("clip"), ROBERTA: folders.get("roberta")}, []

    def folder(self, repository: str, *names: str) -> Path:
        self.asked.append((repository, *names))
        if self.folders.get(repository) is None:
            raise HubError("not in the local cache, and the hub does not answer (no route)")
        assert all((self.folders[repository] / name).is_file() for name in names)
        return self.folders[repository]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory):
    """A small CLIP that open_clip knows by name with a tag ``openai``, a small RoBERTa with its tokenizer."""
    ensure_torchvision()
    import open_clip

    root = tmp_path_factory.mktemp("published")
    architecture = root / "tiny-clip.json"
    text = {"context_length": 8, "vocab_size": 9, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 3, "width": 32, "patch_size": 16, "head_width": 16}
    architecture.write_text(json.dumps({"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}))
    (root / "clip").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        open_clip.add_model_config(architecture)
        tag = {"hf_hub": f"{CLIP}/", "quick_gelu": True}
        patch.setitem(open_clip.pretrained._PRETRAINED, "tiny-clip", {"openai": tag})
        patch.setitem(open_clip.pretrained._PRETRAINED, "ViT-B-32", {"openai": tag, "other": tag})
        clip = open_clip.create_model("tiny-clip", precision="fp32")
        save_file(clip.state_dict(), root / "clip" / "open_clip_model.safetensors")

        tokenizer = load_tokenizer(write_tokenizer(root / "tokenizer"))
        save_text_model(root / "roberta", vocab_size=tokenizer.vocabulary.size)
        shutil.copy(root / "tokenizer" / "tokenizer.json", root / "roberta")
        patch.setattr(starting_weights, "ROBERTA_TOKENS", tokenizer.vocabulary.size)
        sizes = {"width": 32, "heads": 2, "ffn_width": 64, "max_positions": 40}
        patch.setattr(starting_weights, "ROBERTA_SIZES", sizes)
        yield root
    architecture.unlink()


@pytest.fixture
def tokenizer(published: Path) -> TextTokenizer:
    return load_tokenizer(published / "tokenizer")


def hub_of(published: Path) -> FakeHub:
    return FakeHub(clip=published / "clip", roberta=published / "roberta")


def auto_config(vision: str | None = "auto", text: str | None = "auto") -> ModelConfig:
    config = tiny_config()
    config.vision.name, config.vision.image_size = "tiny-clip", 48
    config.vision.pretrained, config.text.pretrained = vision, text
    return config


def build(config: ModelConfig, tokenizer: TextTokenizer) -> torch.nn.Module:
    torch.manual_seed(3)
    return build_objective(config, FLMOptions(), tokenizer.vocabulary, 24)


def start(config: ModelConfig, tokenizer: TextTokenizer, hub: FakeHub) -> tuple[torch.nn.Module, dict, set[str]]:
    """The objective, what it started from, and the parts of it that are no longer as they were drawn."""
    objective = build(config, tokenizer)
    before = {name: value.clone() for name, value in objective.net.named_parameters()}
    found = load_starting_weights(objective, config, tokenizer, ALONE, Agreement(), hub)
    changed = {n.split(".")[0] for n, value in objective.net.named_parameters() if not torch.equal(before[n], value)}
    return objective, found, changed


def test_auto_takes_what_can_be_had_and_fits(published: Path, tokenizer: TextTokenizer) -> None:
    hub = hub_of(published)
    objective, found, changed = start(auto_config(), tokenizer, hub)
    assert changed == {"vision", "embedding", "bottom"}
    clip = load_file(published / "clip" / "open_clip_model.safetensors")
    roberta = load_file(published / "roberta" / "model.safetensors")
    net = objective.net
    assert torch.equal(net.vision.patch_embedding.weight, clip["visual.conv1.weight"])
    assert net.vision.position_embedding.shape == (1 + 9, 32)  # 48 px in patches of 16, resized from 1 + 4
    assert torch.equal(net.embedding.word.weight, roberta["embeddings.word_embeddings.weight"])
    assert found["vision"]["taken"].startswith("openai (") and found["text"]["taken"].startswith("roberta-base (")
    line, warnings = describe_start(found)
    assert warnings == [] and line.startswith("starting weights: vision openai (")
    assert json.loads(json.dumps(found)) == found


def test_without_the_hub_the_weights_are_random_and_it_is_said(published: Path, tokenizer: TextTokenizer) -> None:
    _, found, changed = start(auto_config(), tokenizer, FakeHub(clip=published / "clip"))
    assert changed == {"vision"} and found["text"]["taken"] is None
    _, found, changed = start(auto_config(), tokenizer, FakeHub())
    assert changed == set()
    line, warnings = describe_start(found)
    assert line == "starting weights: vision random, text random"
    for warning, tower, source in zip(warnings, ("vision", "text"), ("openai", "roberta-base"), strict=True):
        assert "RANDOM" in warning and "the hub does not answer (no route)" in warning and "\n" not in warning
        assert f"--model.{tower}.pretrained {source} " in warning and f"--model.{tower}.pretrained null" in warning


def test_null_asks_nobody_and_warns_of_nothing(tokenizer: TextTokenizer, published: Path) -> None:
    hub = hub_of(published)
    _, found, changed = start(auto_config(None, None), tokenizer, hub)
    assert (changed, hub.asked) == (set(), [])
    assert describe_start(found) == ("starting weights: vision random, text random", [])


def other_numbers(folder: Path, number: int) -> TextTokenizer:
    """A tokenizer of the same size and special tokens in which two words have changed places."""
    write_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = (next(token for token, i in vocabulary.items() if i == n) for n in (number, number + 1))
    vocabulary[first], vocabulary[second] = number + 1, number
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(folder)


def test_another_vocabulary_of_equal_size_does_not_fit(published: Path, tmp_path: Path) -> None:
    """Ids that mean other words there: taken by auto as random, refused where the weights were named."""
    other, hub = other_numbers(tmp_path / "other", 265), hub_of(published)
    _, found, changed = start(auto_config(), other, hub)
    assert changed == {"vision"} and "is another one than roberta-base's (" in found["text"]["reason"]
    assert "is token 265 here, 266 there" in found["text"]["reason"] and "--data.tokenizer" in found["text"]["reason"]
    assert hub.asked[1:] == [(ROBERTA, "tokenizer.json")], "the weights were fetched for nothing"
    with pytest.raises(ConfigError, match="not the one that its words were learned with .*use --data.tokenizer"):
        start(auto_config(None, str(published / "roberta")), other, hub)


@pytest.mark.parametrize(
    ("section", "change", "reason"),
    [
        ("vision", {"name": None}, "model.vision.name is null"),
        ("vision", {"name": "ViT-B-32"}, "openai's weights want QuickGELU, which ViT-B-32 has not"),
        ("vision", {"name": "ViT-B-32-256"}, "open_clip has no openai weights of ViT-B-32-256"),
        ("text", {"heads": 4}, "model.text.heads is 4, roberta-base's 2"),
        ("text", {"max_positions": 30}, "model.text.max_positions is 30, roberta-base's 40"),
        ("text", {"bottom_layers": 13}, "model.text.bottom_layers is 13, roberta-base has 12"),
    ],
)
def test_towers_of_other_sizes_ask_nobody(
    tokenizer: TextTokenizer, published: Path, section: str, change: dict, reason: str
) -> None:
    config, hub = auto_config(), hub_of(published)
    config.vision.width, config.vision.layers, config.vision.image_size = 32, 1, 256
    for name, value in change.items():
        setattr(getattr(config, section), name, value)
    config.vision.pretrained = "auto" if section == "vision" else None
    config.text.pretrained = "auto" if section == "text" else None
    with torch.device("meta" if section == "vision" else "cpu"):  # a ViT-B is too large for a test
        objective = build(config, tokenizer)
    found = load_starting_weights(objective, config, tokenizer, ALONE, Agreement(), hub)
    assert found[section]["taken"] is None and reason in found[section]["reason"]
    assert hub.asked == []


def test_a_tokenizer_of_another_size_asks_nobody(tokenizer: TextTokenizer, published: Path, monkeypatch) -> None:
    """As that of `python -m data_prep tokenizer` has: nothing is fetched to find out."""
    monkeypatch.setattr(starting_weights, "ROBERTA_TOKENS", 50265)
    hub = hub_of(published)
    _, found, _ = start(auto_config(None), tokenizer, hub)
    assert f"has {tokenizer.vocabulary.size} tokens, roberta-base's 50265" in found["text"]["reason"]
    assert "--data.tokenizer roberta-base" in found["text"]["reason"] and hub.asked == []


def test_a_damaged_cache_is_no_weights(published: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    hub = hub_of(published)
    for name in ("clip", "roberta"):
        hub.folders[CLIP if name == "clip" else ROBERTA] = Path(shutil.copytree(published / name, tmp_path / name))
        for file in (tmp_path / name).glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:5000])
    _, found, changed = start(auto_config(), tokenizer, hub)
    assert changed == set() and found["vision"]["taken"] is found["text"]["taken"] is None
    assert all("\n" not in warning for warning in describe_start(found)[1])


def test_named_weights_are_strict(published: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    hub = hub_of(published)
    named = auto_config(str(published / "clip" / "open_clip_model.safetensors"), str(published / "roberta"))
    _, found, changed = start(named, tokenizer, hub)
    assert changed == {"vision", "embedding", "bottom"} and found["text"]["taken"] == str(published / "roberta")
    with pytest.raises(ConfigError, match=r"model\.text\.pretrained .*can't be loaded"):
        start(auto_config("auto", str(tmp_path)), tokenizer, hub)
    with pytest.raises(ConfigError, match=r"model\.vision\.pretrained .*neither a file nor a tag"):
        start(auto_config("./gone.safetensors"), tokenizer, hub)


def start_of_rank(place: Place, stage: int, published: Path) -> tuple[dict, str | None, dict]:
    """What every rank believes, what it has without the engine, and the weights that it trains from."""
    tokenizer = load_tokenizer(published / "tokenizer")
    hub = hub_of(published)
    found = []

    def objective() -> torch.nn.Module:
        torch.manual_seed(place.rank)  # so that nothing is equal by chance
        built = build_objective(auto_config(), FLMOptions(), tokenizer.vocabulary, 24)
        found.append(load_starting_weights(built, auto_config(), tokenizer, place, Agreement(), hub))
        return built

    engine, agreement = make_engine(place, engine_config(), stage, objective)
    weights = {name: value["weight"].numpy() for name, value in engine.named_state()}
    error = None
    try:
        load_starting_weights(
            engine.objective, auto_config(None, "./gone" if place.is_main else None), tokenizer, place, agreement, hub
        )
    except ConfigError as refused:
        error = str(refused)
    assert place.is_main or hub.asked == [], "only rank 0 may ask"
    return found[0], error, weights


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_all_ranks_train_from_what_rank_0_found(published: Path, stage: int) -> None:
    """Rank 1 reads no file: it gets the weights from the engine, and rank 0's error too."""
    first, second = run_ranks(2, start_of_rank, stage, published)
    assert first[0] == second[0] and first[0]["text"]["taken"] is not None
    assert first[1] == second[1] and "./gone" in first[1]
    clip = load_file(published / "clip" / "open_clip_model.safetensors")
    for weights in (first[2], second[2]):
        assert torch.equal(torch.from_numpy(weights["net.vision.class_embedding"]), clip["visual.class_embedding"])
        assert all((weights[name] == value).all() for name, value in first[2].items())


def roberta_as_published() -> None:
    """Undo, in a fork, what the fixture ``published`` says of RoBERTa's sizes."""
    importlib.reload(starting_weights)


@pytest.mark.slow
def test_a_run_notes_what_it_started_from_and_a_resumed_one_does_not_ask(work: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(work / "empty"))
    run = work / "runs" / "auto"
    options = [*SHORT, "--model.vision.pretrained", "auto", "--train.eval_every", "0"]
    options += ["--model.text.pretrained", "auto", "--output", run]
    done = finish(program(*options, "--train.steps", "2"), work, prepare=roberta_as_published)
    assert done.returncode == 0 and done.stderr.count("WARNING: the") == 2, done.stderr
    assert "starting weights: vision random, text random" in done.stdout
    noted = json.loads((run / "environment.json").read_text())["starting_weights"]
    assert noted["text"]["asked"] == "auto" and "model.text.width is 32" in noted["text"]["reason"]

    done = finish(program(*options, "--model.text.pretrained", "./gone", "--train.steps", "3"), work)
    assert done.returncode == 0 and "WARNING: the" not in done.stderr + done.stdout, done.stderr
    assert json.loads((run / "environment.json").read_text())["starting_weights"] == noted
    assert max(losses(run)) == 3
