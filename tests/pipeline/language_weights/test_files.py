"""A language model is read once, a tensor at a time, from one file or several; what can't be read is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.language.causal_lm import LanguageModel, language_settings
from model.torchvision_shim import ensure_torchvision
from pipeline.language_weights import loading
from pipeline.language_weights.files import INDEX, WHOLE
from pipeline.language_weights.loading import load_language
from tests.tiny_frozen_parts import write_language_model

ensure_torchvision()
KILOBYTE, PEAK = 1024, Path("/proc/self/status")


def save_again(folder: Path, state: dict[str, torch.Tensor], num_shards: int = 1) -> None:
    """The weights of a folder in so many files, with transformers' index."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    if num_shards == 1:
        return save_file(state, folder / WHOLE, metadata={"format": "pt"})
    names = sorted(state)
    files = [f"model-{n + 1:05}-of-{num_shards:05}.safetensors" for n in range(num_shards)]
    where = {name: files[number * num_shards // len(names)] for number, name in enumerate(names)}
    for file in files:
        part = {name: state[name] for name in names if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return None


def loaded(folder: Path) -> LanguageModel:
    language = LanguageModel(language_settings(str(folder)))
    load_language(language, str(folder))
    return language


def by_transformers(folder: Path) -> dict[str, torch.Tensor]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.named_parameters())


def is_transformers(folder: Path) -> bool:
    expected, found = by_transformers(folder), dict(loaded(folder).llm.named_parameters())
    return set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture
def no_second_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own loading, which holds a model of its own, is an error."""
    monkeypatch.setattr(loading, "_by_transformers", lambda *_: pytest.fail("a second model was made"))


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("case", ["as it is", "half", "tied twice", "without the head's module"])
def test_files_are_read_as_transformers_reads_them(
    tmp_path: Path, no_second_model: None, kind: str, num_shards: int, case: str
) -> None:
    """Of any dtype; with a tied tensor under both names; saved from the model below the head."""
    folder = write_language_model(tmp_path / "llm", kind)
    state = load_file(folder / WHOLE)
    if case == "half":
        state = {name: value.half() for name, value in state.items()}
    elif case == "tied twice":
        table = next(value for name, value in state.items() if "embed_tokens" in name)
        state["lm_head.weight"] = table.clone()
    elif case == "without the head's module":
        state = {name.removeprefix("model."): value for name, value in state.items()}
    save_again(folder, state, num_shards)
    assert is_transformers(folder)


def test_names_that_transformers_changes_are_left_to_it(tmp_path: Path) -> None:
    """A tensor too many is such a case; one too few is refused by name."""
    folder = write_language_model(tmp_path / "llm")
    state = load_file(folder / WHOLE)
    save_again(folder, state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert is_transformers(folder)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_again(folder, state)
    with pytest.raises(ValueError, match="its weights lack model.layers.1.mlp.up_proj.weight"):
        loaded(folder)


def test_what_can_not_be_read_is_one_line(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "llm")
    state = load_file(folder / WHOLE)
    save_again(folder, state, 3)
    index = json.loads((folder / INDEX).read_text())
    second = sorted(set(index["weight_map"].values()))[1]

    def refused(change: Any) -> str:
        (folder / INDEX).write_text(json.dumps(change))
        with pytest.raises(ValueError) as error:
            loaded(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
        return str(error.value)

    outside = index["weight_map"] | {"model.norm.weight": "../llm.safetensors"}
    assert "names '../llm.safetensors', expected names of safetensors beside it" in refused({"weight_map": outside})
    assert "is no index of weights" in refused([1])
    assert "is no index of weights" in refused({"weight_map": None})
    kept = (folder / second).read_bytes()
    (folder / second).write_bytes(kept[: len(kept) // 2])
    assert f"{second} is not readable" in refused(index)
    (folder / second).unlink()
    assert f"lacks {second}, which its {INDEX} names" in refused(index)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"has neither {WHOLE} nor {INDEX}; give a folder or hub name"):
        loaded(folder)


def test_another_shape_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "llm")
    state = load_file(folder / WHOLE)
    save_again(folder, state | {"model.norm.weight": torch.ones(33)})
    language = LanguageModel(language_settings(str(folder)))
    before = {name: value.clone() for name, value in language.named_parameters()}
    with pytest.raises(ValueError, match="model.norm.weight has shape .33,., expected .32,. as its config.json says"):
        load_language(language, str(folder))
    assert all(torch.equal(value, before[name]) for name, value in language.named_parameters())


@pytest.mark.slow
@pytest.mark.skipif(not PEAK.exists() or not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_memory_is_that_of_the_model_and_one_file(tmp_path: Path, no_second_model: None) -> None:
    """The largest memory of the process while eight files are read into a model that is there: one file more."""
    folder = write_language_model(tmp_path / "llm", width=1024)
    state = load_file(folder / WHOLE)
    size = sum(value.nbytes for value in state.values())
    save_again(folder, {name: value.contiguous() for name, value in state.items()}, 8)
    largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    del state
    language = LanguageModel(language_settings(str(folder)))
    for parameter in language.parameters():  # so that its memory is taken
        torch.nn.init.ones_(parameter)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident("VmRSS")
    load_language(language, str(folder))
    grown = resident("VmHWM") - before
    assert largest < size / 2 and grown < 1.5 * largest, (grown, largest, size)


def resident(name: str) -> int:
    """Bytes of memory of this process."""
    line = next(line for line in PEAK.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * KILOBYTE
