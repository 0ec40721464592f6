"""A language model in a GGUF file becomes a folder that EVLGen trains with."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from model.language.causal_lm import LanguageModel, language_settings
from pipeline.convert import main as convert
from pipeline.data.tokenizer import load_tokenizer
from pipeline.language_weights.loading import load_language
from pipeline.weights import gguf as reading

WIDTH, LAYERS = 32, 2


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A random Llama of bytes; returns its tensors by GGUF's names."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (pip install '.[gguf]')")
    generator = np.random.default_rng(0)
    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, *[1] * (len(words) - 1)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (len(words), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        sizes = {"attn_q": WIDTH, "attn_k": WIDTH // 2, "attn_v": WIDTH // 2, "attn_output": WIDTH}
        shapes |= {f"blk.{layer}.{name}": (rows, WIDTH) for name, rows in sizes.items()}
        shapes |= {f"blk.{layer}.ffn_{name}": (64, WIDTH) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (WIDTH, 64)}
        shapes |= {f"blk.{layer}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    tensors = {f"{name}.weight": generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_file_becomes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    assert convert(["import-gguf", str(tmp_path / "tiny.gguf"), str(tmp_path / "llm")]) == 0
    assert "llama" in capsys.readouterr().out
    settings = language_settings(str(tmp_path / "llm"))
    language = LanguageModel(settings)
    load_language(language, str(tmp_path / "llm"))
    layer = language.llm.base_model.layers[1]
    for mine, name in (
        (language.llm.get_input_embeddings(), "token_embd"),
        (layer.self_attn.v_proj, "blk.1.attn_v"),
        (layer.mlp.down_proj, "blk.1.ffn_down"),
    ):
        assert torch.equal(mine.weight, torch.from_numpy(tensors[f"{name}.weight"]).half().float())
    tokenizer = load_tokenizer(tmp_path / "llm", of_language_model=True)
    assert tokenizer.vocabulary.bos_id == 0 and tokenizer.decode(tokenizer.encode("a cab", 20)) == "a cab"
    assert str(tmp_path) not in (tmp_path / "llm" / "config.json").read_text()
    assert convert(["import-gguf", str(tmp_path / "tiny.gguf"), str(tmp_path / "llm")]) == 2
    assert "exists; choose another name" in capsys.readouterr().err


def test_what_can_not_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").write_bytes(b"PK\x03\x04")
    assert convert(["import-gguf", str(tmp_path / "other"), str(tmp_path / "out")]) == 2
    assert "is no GGUF file" in capsys.readouterr().err
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\x03\x00")
    if importlib.util.find_spec("gguf") is not None:
        assert convert(["import-gguf", str(tmp_path / "torn.gguf"), str(tmp_path / "out")]) == 2
        assert "transformers can't read it" in capsys.readouterr().err
    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda name: None)
    assert convert(["import-gguf", str(tmp_path / "torn.gguf"), str(tmp_path / "out")]) == 2
    assert "run: pip install gguf==0.19.0 accelerate==1.15.0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.part"))
