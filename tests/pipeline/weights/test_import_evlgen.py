"""Checkpoints of EVLGen's release become folders that this project evaluates and trains from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from model.build import build_evlgen
from model.config import ConnectorConfig
from model.connectors.connector import Connector
from model.vision.tower import Grid
from model.weights.released_evlgen import RULES, by_one_name, read_connector
from model.weights.start import start_from
from pipeline.config.command_line import parse_command_line
from pipeline.convert import main as convert
from pipeline.data.tokenizer import tokenizer_of
from pipeline.weights.starting import load_trained
from tests.tiny_frozen_parts import write_clip, write_language_model

WIDTH, LAYERS, MERGES = 32, 2, 3


def released_state(kind: str = "opt") -> dict[str, torch.Tensor]:
    """Random tensors of the release's names, of flm_tiny's tower and the test's language model; and its junk."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"ln_vision.weight": (32,), "ln_vision.bias": (32,)}
    shapes |= {"VL_proj.weight": (WIDTH, 32), "VL_proj.bias": (WIDTH,)}
    last = "opt_proj" if kind == "opt" else "llm_proj"
    shapes |= {f"{last}.weight": (32, WIDTH), f"{last}.bias": (32,)}
    inside = {"position_embeddings.weight": (24, WIDTH), "token_type_embeddings.weight": (2, WIDTH)}
    inside |= {"LayerNorm.weight": (WIDTH,), "LayerNorm.bias": (WIDTH,)}
    shapes |= {f"VLconnector.embeddings.{name}": shape for name, shape in inside.items()}
    for layer in range(LAYERS):
        linear = {f"attention.self.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value")}
        linear |= {
            "attention.output.dense": (WIDTH, WIDTH),
            "intermediate.dense": (64, WIDTH),
            "output.dense": (WIDTH, 64),
        }
        norms = ("attention.output.LayerNorm", "output.LayerNorm")
        for name, shape in {**linear, **dict.fromkeys(norms, (WIDTH,))}.items():
            shapes[f"VLconnector.encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"VLconnector.encoder.layer.{layer}.{name}.bias"] = shape[:1]
    shapes |= (
        {"opt_model.lm_head.weight": (257, 32)} if kind == "opt" else {"llm_model.model.rotary_emb.inv_freq": (4,)}
    )
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that names a tower and a language model of the right widths."""
    write_clip(tmp_path / "clip.safetensors")
    write_language_model(tmp_path / "llm", "opt")
    model: dict[str, Any] = {
        "vision": {"frozen": True, "pretrained": str(tmp_path / "clip.safetensors")},
        "language": {"name": str(tmp_path / "llm")},
        "connector": {"num_tokens": 11},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": "evlgen_tiny", "model": model}))
    return path


def released_checkpoint(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """As the release's trainer writes it."""
    torch.save({"model": state, "optimizer": {"state": {}}, "config": {"run": {}}, "scaler": None, "iters": 7}, path)
    return path


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_an_imported_model_is_whole(
    kind: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every trained tensor arrives, frozen parts come from where the recipe says, junk is named."""
    state = released_state(kind)
    checkpoint, out = released_checkpoint(tmp_path / "checkpoint.pth", state), tmp_path / "imported"
    words = ["import-evlgen", str(checkpoint), str(out), "--recipe", str(recipe), "--merges", str(MERGES)]
    assert convert(words) == 0
    assert "1 keys unread" in capsys.readouterr().out
    config = parse_command_line(["--recipe", str(out / "recipe.yaml")]).config
    assert (config.model.connector.merges_per_layer, config.model.connector.merging) == (MERGES, "plain")
    assert config.model.behaviour == "released" and config.model.weights == str(out)
    objective = build_evlgen(config.model, tokenizer_of(config).vocabulary, config.data.max_text_length)
    load_trained(objective, config.model, out)
    by_name = dict(objective.named_parameters())
    assert load_file(out / "weights.safetensors").keys() == {n for n, p in by_name.items() if "connector" in n}
    assert torch.equal(
        by_name["net.connector.body.token_type"], state["VLconnector.embeddings.token_type_embeddings.weight"][0]
    )
    clip, llm = load_file(tmp_path / "clip.safetensors"), load_file(tmp_path / "llm" / "model.safetensors")
    assert torch.equal(by_name["net.vision.class_embedding"], clip["visual.class_embedding"])
    name = "model.decoder.layers.1.fc1.weight"
    assert torch.equal(by_name[f"net.language.llm.{name}"], llm[name])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"surplus": torch.zeros(1)}, "the model has no place for surplus"),
        ({"ln_vision.bias": None}, "weights lack ln_vision.bias"),
        ({"VL_proj.bias": torch.zeros(3)}, "VL_proj.bias has shape (3,), the model's net.connector.input.bias (32,)"),
        ({"VL_proj.weight": torch.zeros(WIDTH, 16)}, "is for a tower of width 16 and a language model of 32"),
        ({"VL_proj.weight": None}, "no matrix VL_proj.weight; expected the state dict of a released EVLGen checkpoint"),
    ],
)
def test_what_does_not_fit_is_one_line(
    change: dict[str, Any], error: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name: value for name, value in (released_state() | change).items() if value is not None}
    checkpoint = released_checkpoint(tmp_path / "checkpoint.pth", state)
    assert convert(["import-evlgen", str(checkpoint), str(tmp_path / "out"), "--recipe", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("language_width", "total"), [(2560, 88_504_320), (4096, 89_685_504)])
def test_the_real_layouts_have_no_unexplained_key(language_width: int, total: int) -> None:
    """Tensors of the real shapes (specification section 2): 202 of an image model, and their number of parameters."""
    shapes = {
        "ln_vision.weight": (1408,),
        "ln_vision.bias": (1408,),
        "VL_proj.weight": (768, 1408),
        "VL_proj.bias": (768,),
    }
    shapes |= {"opt_proj.weight": (language_width, 768), "opt_proj.bias": (language_width,)}
    with torch.device("meta"):
        from transformers import BertConfig, BertModel

        bert = BertModel(BertConfig(vocab_size=1), add_pooling_layer=False)
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    inside = {name: value for name, value in bert.state_dict().items() if "word_embeddings" not in name}
    inside.pop("embeddings.position_ids", None)
    inside.pop("embeddings.token_type_ids", None)
    state |= {f"VLconnector.{name}": value for name, value in inside.items()}
    assert len(state) == 202
    state = by_one_name(state)
    config, tower_width, found_width = read_connector(state)
    assert (config.layers, config.heads, config.ffn_width, config.max_positions) == (12, 12, 3072, 512)
    assert (tower_width, found_width) == (1408, language_width) and isinstance(config, ConnectorConfig)
    with torch.device("meta"):
        connector = Connector(config, 257, tower_width, Grid(16, 16, 1), found_width)
    rules = tuple((ours.removeprefix(r"net\.connector\."), theirs) for ours, theirs in RULES)
    loaded = start_from(connector, state, rules)
    assert not loaded.fresh and not loaded.dropped
    assert connector.num_tokens == 29
    of_token_types = 768  # the release keeps two rows, of which one is read
    assert sum(parameter.numel() for parameter in connector.parameters()) + of_token_types == total
