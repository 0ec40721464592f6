"""What of a named tokenizer goes into a run."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.tokenizer import load_tokenizer
from pipeline.training.run_files import copy_tokenizer
from tests.tiny_frozen_parts import write_language_model


def test_of_a_models_folder_the_tokenizer_alone_is_copied(tmp_path: Path) -> None:
    model = write_language_model(tmp_path / "model")
    (model / "model.safetensors.index.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"weights")
    (model / "onnx").mkdir()
    (model / "onnx" / "model.onnx").write_bytes(b"weights")
    copy_tokenizer(model, tmp_path / "run")
    copied = sorted(path.name for path in (tmp_path / "run" / "tokenizer").rglob("*"))
    assert "tokenizer.json" in copied and not [name for name in copied if "model" in name or name == "onnx"]
    read = [load_tokenizer(folder, of_language_model=True) for folder in (model, tmp_path / "run" / "tokenizer")]
    assert read[0].fingerprint == read[1].fingerprint
