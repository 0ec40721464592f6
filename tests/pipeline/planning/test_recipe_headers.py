"""What the headers of the recipes of the paper's size say of memory and time is what the planner says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from data_prep.vqa_answers import vocabulary_file
from model.torchvision_shim import ensure_torchvision
from pipeline.config.recipes import RECIPES
from pipeline.plan import main
from tests.tiny_frozen_parts import write_language_model

OPT = dict(vocab_size=50_272, hidden_size=2560, ffn_dim=10_240, num_hidden_layers=32, num_attention_heads=32)
VICUNA = dict(vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32)
BERT_TOKENS = 30_522
COMMAND = re.compile(r"^#   (python -m pipeline\.plan (?:.*\\\n#  )*.*)$", re.MULTILINE)
FIGURES = re.compile(r"by the planner, not measured: ([\d.]+) GiB a GPU, ([\d.]+) s a step")
IN_HEADERS = [path.stem for path in sorted(RECIPES.glob("*.yaml")) if FIGURES.search(path.read_text())]
SHORT = ("flm_base_4m", "evlgen_opt2.7b")


def language_model(folder: Path, recipe: str) -> Path:
    """The configuration of a published model of these sizes, with a small tokenizer and no weights."""
    ensure_torchvision()
    import transformers

    write_language_model(folder)
    (folder / "model.safetensors").unlink()
    if recipe == "evlgen_vicuna7b":
        settings = transformers.LlamaConfig(**VICUNA, num_attention_heads=32)
    else:
        settings = transformers.OPTConfig(**OPT, word_embed_proj_dim=2560, max_position_embeddings=2048)
    settings.save_pretrained(folder)
    return folder


def bert_tokenizer(folder: Path) -> Path:
    """A tokenizer with as many tokens as BERT's."""
    ensure_torchvision()
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *(f"word{number}" for number in range(BERT_TOKENS - 5))]
    engine = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "[UNK]"))
    roles = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", unk_token="[UNK]")
    PreTrainedTokenizerFast(tokenizer_object=engine, **roles).save_pretrained(folder)
    return folder


def stand_ins(recipe: str, folder: Path) -> list[str]:
    """Options that name what a planner needs of published files: sizes and counts."""
    words: list[str] = []
    if recipe.startswith("evlgen"):
        words += ["--model.language.name", str(language_model(folder / "language", recipe))]
    if recipe.startswith("qformer"):
        words += ["--data.tokenizer", str(bert_tokenizer(folder / "tokenizer"))]
    if "vqa" in recipe:
        answers = vocabulary_file([(f"answer{number}", 9) for number in range(3129)], ["train"])
        (folder / "answers.json").write_text(json.dumps(answers))
        words += ["--task.answers", str(folder / "answers.json")]
    return words


def test_the_recipes_of_the_papers_size_have_figures() -> None:
    of_paper = {"flm_base_4m", "evlgen_opt2.7b", "evlgen_vicuna7b", "evlgen_video_opt2.7b", "evlgen_vqa_opt2.7b",
                "qformer_stage1", "vqav2", "nlvr2", "coco_caption", "f30k_retrieval", "snli_ve"}  # fmt: skip
    assert of_paper <= set(IN_HEADERS)


@pytest.mark.slow(20)
@pytest.mark.parametrize(
    "recipe", [pytest.param(one, marks=() if one in SHORT else pytest.mark.extended) for one in IN_HEADERS]
)
def test_figures_of_a_header(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = (RECIPES / f"{recipe}.yaml").read_text()
    command = COMMAND.search(header)[1].replace("\\\n#", " ")
    words = shlex.split(command)[3:]
    assert words[words.index("--recipe") + 1] == recipe
    words += stand_ins(recipe, tmp_path)
    capsys.readouterr()  # what libraries said of the stand-ins
    assert main([*words, "--json"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["configurations"]
    gib, seconds = FIGURES.search(header).groups()
    assert f"{planned['memory_bytes'] / 2**30:.1f}" == gib
    assert f"{planned['step_seconds']:.3f}" == seconds
