"""Every task and objective is exported and compared, also where its data is gone; so are imported models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.tokenizer import train_tokenizer
from pipeline.convert import main as convert
from pipeline.export import main
from pipeline.exporting.card import KINDS as WORDS
from pipeline.finetuning.table import TASKS
from tests.model.vision.test_tower import hf_folder, hf_vit_settings
from tests.pipeline.exporting.exported_runs import loaded, make_data
from tests.released_fixture import released_fixture
from tests.written_run import TINY, write_run

TEXT = TINY.replace('paths: ["{data}"]', 'paths: [gone], tokenizer: "{data}/tokenizer"')
EVLGEN = """
model:
  vision: {{name: null, pretrained: "{data}/clip.safetensors", frozen: true, image_size: 32, patch_size: 8, width: 32,
    layers: 2, head_width: 16, drop_last_block: false}}
  connector: {{name: qformer, num_tokens: 4, width: 32, heads: 2, ffn_width: 64, layers: 2, max_positions: 32}}
"""
LANGUAGE = EVLGEN + '  language: {{name: "{data}/llm"}}\nobjective: {{name: evlgen}}\n'
OF_LANGUAGE = "data: {{paths: [gone], max_text_length: 60{more}}}\n"
KINDS = {
    "mlm": TEXT + "objective: {{name: mlm}}\n",
    "prefixlm": TEXT + "objective: {{name: prefixlm}}\n",
    "captioning": TEXT + "task: {{name: captioning, prompt: a picture of}}\n",
    "released": TEXT.replace("model:\n", "model:\n  behaviour: released\n"),
    "nlvr2": TEXT + "task: {{name: nlvr2}}\n",
    "snli_ve": TEXT + "task: {{name: snli_ve}}\n",
    "retrieval": TEXT + "task: {{name: retrieval, num_negatives: 2}}\n",
    "evlgen_vqa": LANGUAGE + "task: {{name: vqa, generative: true}}\n" + OF_LANGUAGE.replace("{more}", ""),
    "video": LANGUAGE + OF_LANGUAGE.replace("{more}", ", frames: 2"),
    "hf": TEXT.replace("{{name: null, ", '{{name: "hf/{data}/vit", '),
    "stage1": EVLGEN
    + "objective: {{name: qformer_stage1, embedding_width: 16}}\n"
    + OF_LANGUAGE.replace("60{more}", '20, tokenizer: "{data}/tokenizer"'),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_data(tmp_path_factory.mktemp("tasks"))
    hf_folder(folder / "vit", hf_vit_settings())
    return folder


def test_the_card_has_words_for_every_task() -> None:
    assert set(WORDS) == set(TASKS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_task_is_compared_by_generated_samples(
    data: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    run = write_run(tmp_path / "run", data, KINDS[kind])
    assert main([str(run), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    words = capsys.readouterr().out
    assert "4 generated samples" in words and "logits of" in words
    expected = loaded(run)[2].state_dict()
    aside = data.rename(data.with_name("elsewhere"))
    try:
        found = loaded(tmp_path / "out")[2].state_dict()
    finally:
        aside.rename(data)
    assert expected.keys() == found.keys() and all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.slow
def test_an_imported_release_is_exported_with_a_tokenizer(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The tokenizer must have as many tokens as the release, of whose settings nothing else is missing."""
    content = {"state_dict": released_fixture("flm")[1], "hyper_parameters": {"num_heads": 4}}
    torch.save(content, tmp_path / "released.ckpt")
    assert convert(["import-flm", str(tmp_path / "released.ckpt"), str(tmp_path / "imported")]) == 0
    words = [str(tmp_path / "imported"), str(tmp_path / "out"), "--tokenizer"]
    assert main([*words, str(data / "tokenizer")]) == 2
    error = capsys.readouterr().err
    assert "vocabulary" in error and error.count("\n") == 1
    train_tokenizer([data / "synth" / "train"], tmp_path / "tokenizer", 292)
    assert main([*words, str(tmp_path / "tokenizer")]) == 0, capsys.readouterr().err
    _, _, found = loaded(tmp_path / "out")
    assert found.config.behaviour == "released"
    assert "imported model" in (tmp_path / "out" / "README.md").read_text()
