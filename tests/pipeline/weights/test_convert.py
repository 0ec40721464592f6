"""Released checkpoints of every layout become ours and go back; nothing in a foreign file is run."""

from __future__ import annotations

import json
import os
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.build import build_objective
from model.config import FLMOptions, ModelConfig, Vocabulary
from model.weights.released import from_released, import_released, read_layout, to_released
from model.weights.start import Loaded
from pipeline.config.command_line import parse_command_line
from pipeline.convert import main
from pipeline.weights.sources import load_model
from tests.model.weights.test_released import released_objective
from tests.oracle import oracle_file
from tests.released_fixture import released_fixture


class Callback:
    """What a training framework leaves in its checkpoints."""


class Bomb:
    def __init__(self, function: Callable, argument: object) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


@pytest.fixture(scope="module")
def released_state() -> dict[str, torch.Tensor]:
    return released_fixture("flm")[1]


@pytest.fixture
def checkpoint(released_state, tmp_path: Path) -> Path:
    """As the release's framework writes it: other objects beside the tensors."""
    path = tmp_path / "released.ckpt"
    content = {"state_dict": released_state, "callbacks": {Callback: {"best": Callback()}}, "epoch": 3}
    torch.save(content | {"hyper_parameters": {"num_heads": 4}}, path)
    return path


def test_import_gives_the_weights_of_the_importer_and_export_goes_back(checkpoint, released_state, tmp_path) -> None:
    out, back = tmp_path / "imported", tmp_path / "back.ckpt"
    assert main(["import-flm", str(checkpoint), str(out)]) == 0
    objective = released_objective()
    import_released(objective, released_state)
    imported = load_file(out / "weights.safetensors")
    expected = dict(objective.named_parameters())
    assert imported.keys() == expected.keys()
    assert all(torch.equal(imported[name], value) for name, value in expected.items())
    assert main(["export-flm", str(out), str(back)]) == 0
    returned = torch.load(back, weights_only=True)["state_dict"]
    report = json.loads((out / "import.json").read_text())
    assert set(returned) == set(released_state) - set(report["dead"])
    assert all(torch.equal(value, released_state[name]) for name, value in returned.items())


def started(model: ModelConfig, vocabulary_size: int = 292) -> tuple[torch.nn.Module, Loaded]:
    built = build_objective(model, FLMOptions(), Vocabulary(vocabulary_size, 0, 1, 2, 291), 16)
    return built, load_model(built, model.weights)


def test_training_starts_from_an_imported_model(checkpoint, tmp_path) -> None:
    out = tmp_path / "imported"
    assert main(["import-flm", str(checkpoint), str(out)]) == 0
    launch = parse_command_line(["--recipe", str(out / "recipe.yaml"), "--model.behaviour", "default"])
    model = launch.config.model
    assert model.text.heads == 4 and model.vision.image_size == 96 and model.weights == str(out)
    built, found = started(model)
    imported = load_file(out / "weights.safetensors")
    assert all(torch.equal(imported[n], p) for n, p in built.named_parameters() if not n.startswith("itm_head"))
    assert (found.fresh, found.dropped, found.resized) == (["itm_head.weight", "itm_head.bias"], [], [])
    model.vision.image_size = 128  # another resolution: the position table is resized
    larger, found = started(model)
    assert larger.net.vision.position_embedding.shape[0] == 1 + 16
    assert found.resized == ["net.vision.position_embedding"]


def fine_tuned(released_state: dict[str, torch.Tensor], head: str) -> dict[str, torch.Tensor]:
    """As the release fine-tunes: a head of the task instead of the language model's, a type for a second image."""
    state = {name: value for name, value in released_state.items() if not name.startswith("lm_score")}
    types = state["token_type_embeddings.weight"]
    state["token_type_embeddings.weight"] = torch.cat([types, types[1:] + 1])
    return state | {f"{head}.0.weight": torch.ones(8, 64), f"{head}.0.bias": torch.zeros(8)}


@pytest.mark.parametrize("head", ["vqa_classifier", "nlvr2_classifier", "rank_output"])
def test_training_starts_from_a_fine_tuned_release_too(released_state, tmp_path, head: str) -> None:
    """Its task's head goes, ours begin anew; the network comes whole, without a type for the second image."""
    torch.save({"state_dict": fine_tuned(released_state, head)}, tmp_path / "tuned.ckpt")
    assert main(["import-flm", str(tmp_path / "tuned.ckpt"), str(tmp_path / "out"), "--text-heads", "4"]) == 0
    model = parse_command_line(["--recipe", str(tmp_path / "out" / "recipe.yaml")]).config.model
    built, found = started(model)
    assert found.dropped == [f"task.{head}.0.bias", f"task.{head}.0.weight"]
    assert all(name.startswith("lm_head.") for name in found.fresh) and len(found.fresh) == 6
    assert found.resized == ["net.type_embedding.weight"]
    types = load_file(tmp_path / "out" / "weights.safetensors")["net.type_embedding.weight"]
    assert len(types) == 3 and torch.equal(built.net.type_embedding.weight, types[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.text, "ffn_width", 128), r"model.weights .*shape \(256, 64\).*\(128, 64\)"),
        (lambda m: setattr(m.text, "width", 128), r"model.weights .*shape \(292, 64\), .*\(292, 128\)"),
        (lambda m: setattr(m.text, "max_positions", 80), r"model.weights .*shape \(66, 64\).*\(80, 64\)"),
        (lambda m: setattr(m.reconstructor, "top_layers", 2), r"no place for net\.reconstructor_top\.2.* and 11 more;"),
        (lambda m: setattr(m, "weights", "nowhere"), "a folder made by"),
    ],
)
def test_a_model_of_other_sizes_is_refused(checkpoint, tmp_path, change, message: str) -> None:
    assert main(["import-flm", str(checkpoint), str(tmp_path / "imported")]) == 0
    model = parse_command_line(["--recipe", str(tmp_path / "imported" / "recipe.yaml")]).config.model
    change(model)
    with pytest.raises(ValueError, match=message):
        started(model)


def test_a_tokenizer_of_another_vocabulary_is_refused(checkpoint, tmp_path) -> None:
    assert main(["import-flm", str(checkpoint), str(tmp_path / "imported")]) == 0
    model = parse_command_line(["--recipe", str(tmp_path / "imported" / "recipe.yaml")]).config.model
    with pytest.raises(ValueError, match=r"model.weights .*shape \(292, 64\).*\(300, 64\); width, .*vocabulary"):
        started(model, vocabulary_size=300)


def test_nothing_in_a_foreign_file_is_run(released_state, tmp_path: Path, capsys) -> None:
    """Invariant 7: functions of Python's libraries stay uncalled, those of the system are not even tolerated."""
    path, crater = tmp_path / "evil.ckpt", tmp_path / "crater"
    bombs = Bomb(subprocess.check_call, ["mkdir", str(crater)]), Bomb(os.mkdir, str(crater))
    for number, bomb in enumerate(bombs):
        content = {"hyper_parameters": bomb, "callbacks": [bomb]}
        torch.save({"state_dict": released_state, **content}, path)
        out = tmp_path / f"imported{number}"
        assert main(["import-flm", str(path), str(out), "--text-heads", "4"]) == (0, 2)[number]
        assert not crater.exists() and out.exists() == (number == 0)
    error = capsys.readouterr().err
    assert "asks for posix.mkdir: no file of weights does" in error and error.count("\n") == 1


class WritesFile(torch.nn.Module):
    """TorchScript runs ``__setstate__`` when it is read, and may write files in it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.tensor = path, torch.zeros(1)

    def forward(self) -> torch.Tensor:
        return self.tensor

    @torch.jit.export
    def __getstate__(self) -> tuple[str, torch.Tensor, bool]:
        return self.path, self.tensor, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]) -> None:
        self.path, self.tensor, self.training = state
        torch.save(self.tensor, self.path)


def test_a_program_is_refused_before_it_is_read(tmp_path: Path, capsys) -> None:
    """Invariant 7."""
    path, trace = tmp_path / "program.ckpt", tmp_path / "trace"
    torch.jit.script(WritesFile(str(trace))).save(path)
    torch.jit.load(path)
    assert trace.is_file(), "the program does run where it is let"
    trace.unlink()
    assert main(["import-flm", str(path), str(tmp_path / "out")]) == 2
    assert "is a TorchScript program" in capsys.readouterr().err and not trace.exists()


def mixed_up(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A key of 32 rows and a value of 96, together as many as the key and value of 64 each that belong there."""
    name = "text_transformer.encoder.layer.0.attention.self.{}.weight"
    return state | {name.format("key"): torch.zeros(32, 64), name.format("value"): torch.zeros(96, 64)}


def test_files_that_do_not_fit_are_one_line(checkpoint, released_state, tmp_path: Path, capsys) -> None:
    def refused(*arguments: str) -> str:
        assert main([*map(str, arguments)]) == 2
        assert not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    cut, other, odd, wrong = (tmp_path / name for name in ("cut.ckpt", "other.ckpt", "odd.ckpt", "wrong.ckpt"))
    cut.write_bytes(checkpoint.read_bytes()[:20_000])
    torch.save({"state_dict": {"layer.weight": torch.zeros(2)}}, other)
    torch.save({"state_dict": {**released_state, "surprise.weight": torch.zeros(2)}}, odd)
    assert "no such file" in refused("import-flm", tmp_path / "none.ckpt", tmp_path / "out")
    assert "not a file saved by torch.save" in refused("import-flm", cut, tmp_path / "out")
    assert "no tensor text_transformer" in refused("import-flm", other, tmp_path / "out")
    assert "surprise.weight" in refused("import-flm", odd, tmp_path / "out", "--text-heads", "4")
    contents = {"NoneType": None, "list": [], "ForeignObject": Callback(), "named 3": {3: torch.zeros(1)}}
    for message, content in contents.items():
        torch.save({"state_dict": content}, wrong)
        assert message in refused("import-flm", wrong, tmp_path / "out")
    torch.save({"state_dict": mixed_up(released_state)}, wrong)
    assert "of equal shape" in refused("import-flm", wrong, tmp_path / "out", "--text-heads", "4")
    assert "no weights.safetensors in it" in refused("export-flm", tmp_path, tmp_path / "out")


REAL = {
    "pretrain_flm_4m": ("flm", None, 288),
    "vqa_train": ("flm", "vqa", 576),
    "nlvr2_train": ("flm", "nlvr2", 288),
    "caption_train": ("flm", "captioning", 288),
    "irtr_f30k_train": ("flm", "retrieval", 384),
    "mlm_baseline(named configs only)": ("mlm", None, 224),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_size_layouts_import_without_a_key_left_over(name: str) -> None:
    """Every tensor is a number of its own, spread over the real shape; aliases share their first name's."""
    listed = json.loads(oracle_file("g_checkpoint_keys.json").read_text())[name]["keys"]
    state = {
        key: torch.tensor(float(zlib.crc32((alias or key).encode()) % 10_000)).expand(shape)
        for key, shape, _, alias in listed
    }
    layout = read_layout(state)
    assert (layout.objective, layout.task, layout.model.vision.image_size) == REAL[name]
    assert layout.model.text.heads == 12 and layout.model.vision.layers == 12
    weights, report = from_released(state, layout)
    consumed = {key for keys in report.used.values() for key in keys}
    assert len(consumed) + len(report.aliased) + len(report.dead) == len(state)
    assert {key for key, _, _, alias in listed if alias} <= set(report.aliased) | set(report.dead)
    for ours, keys in report.used.items():
        for part, key in zip(weights[ours].chunk(len(keys)), keys, strict=True):
            assert part.flatten()[0] == state[key].flatten()[0], ours
    back = to_released(weights, report)
    assert set(back) == set(state) - set(report.dead)
    assert all(back[key].shape == state[key].shape for key in back)
