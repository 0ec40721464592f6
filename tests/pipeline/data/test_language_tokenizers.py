"""Tokenizers of language models by family: what begins a document, a line, a text's end; none is asked for padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from model.batch import Row
from model.language.text_form import TextForm, text_form
from model.torchvision_shim import ensure_torchvision
from pipeline.config.command_line import parse_command_line
from pipeline.config.options import ConfigError
from pipeline.data.shard_reader import RawSample
from pipeline.data.tokenizer import load_tokenizer
from pipeline.finetuning.captioning import prompt_words
from pipeline.tasks.language_rows import LanguageRows
from tests.model.test_evlgen import small_model

ensure_torchvision()


class Family(NamedTuple):
    """A tokenizer as its family's is made, and what is expected of it."""

    special: list[str]  # from id 0 on
    names: dict[str, str]  # of tokenizer_config.json
    template: str | None  # what it puts in front where it is asked to add tokens
    before: str
    line: bool  # whether a line break is one token
    end: str  # where texts end without lines
    sentencepiece: bool = False


CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FAMILIES = {
    "opt": Family(
        ["<s>", "<pad>", "</s>", "<unk>"],
        dict(bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"),
        "</s>",
        "</s>",
        True,
        "</s>",
    ),
    "llama": Family(
        ["<unk>", "<s>", "</s>"],
        dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
        "<s>",
        "<s>",
        False,
        "</s>",
        sentencepiece=True,
    ),
    "llama3": Family(
        ["<|begin_of_text|>", "<|end_of_text|>"],
        dict(bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"),
        "<|begin_of_text|>",
        "<|begin_of_text|>",
        True,
        "<|end_of_text|>",
    ),
    "qwen2": Family(
        CHAT, dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"), None, "<|endoftext|>", True, "<|im_end|>"
    ),
    "smollm2": Family(
        CHAT,
        dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"),
        None,
        "<|endoftext|>",
        True,
        "<|im_end|>",
    ),
}


def write(folder: Path, family: Family) -> Path:
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    if family.sentencepiece:
        words = [*family.special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a"]
        bpe = models.BPE({w: n for n, w in enumerate(words)}, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
        engine = Tokenizer(bpe)
        engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        engine.decoder = decoders.Sequence(back)
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*family.special, *alphabet, "Ġa"]
        engine = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [("Ġ", "a")]))
        digits = pre_tokenizers.Digits(individual_digits=True)
        engine.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(family.special)
    if family.template is not None:
        pairs = [(family.template, words.index(family.template))]
        engine.post_processor = processors.TemplateProcessing(f"{family.template} $A", special_tokens=pairs)
    transformers.PreTrainedTokenizerFast(tokenizer_object=engine, **family.names).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_caption_is_written_as_its_family_reads(tmp_path: Path, kind: str) -> None:
    """What begins a document stands once, before the image, whether or not the tokenizer adds it by itself; a line
    break is told from a blank; the words are the caption's and come back."""
    family = FAMILIES[kind]
    tokenizer = load_tokenizer(write(tmp_path / kind, family), of_language_model=True)
    ids, vocabulary = tokenizer.tokens, tokenizer.vocabulary
    assert vocabulary.bos_id == ids[family.before] and vocabulary.eos_id == ids[family.end]
    assert (vocabulary.newline_id >= 0) == family.line
    assert 0 <= vocabulary.pad_id < vocabulary.size
    form = text_form(vocabulary, "llama" if kind == "llama3" else kind, released=False)
    line = (vocabulary.newline_id,)
    expected = (line, line) if family.line else ((), (ids[family.end],))
    assert form == TextForm((ids[family.before],), *expected)

    sample = RawSample(key="k", images=[], text="a dog  and\na cat", meta={})
    [row] = LanguageRows(tokenizer, form, 40).rows(sample, 0, None)
    words = row.token_ids[len(form.begin) : -1]
    assert tuple(row.token_ids) == (*form.begin, *words, *form.end)
    assert tokenizer.decode(words) == "a dog and a cat"
    assert not {ids[one] for one in family.special} & set(words) and vocabulary.newline_id not in words


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_released_texts(tmp_path: Path, kind: str) -> None:
    """Specification section 4: of OPT `</s>`, words, line break, all predicted; of Llama `</s>`, words, `</s>`."""
    tokenizer = load_tokenizer(write(tmp_path / kind, FAMILIES[kind]), of_language_model=True)
    form, end = text_form(tokenizer.vocabulary, kind, released=True), tokenizer.tokens["</s>"]
    if kind == "opt":
        line = (tokenizer.vocabulary.newline_id,)
        assert form == TextForm((), (end,), line, predicts_begin=True, cuts_end=True)
    else:
        assert form == TextForm((), (end,), (end,), cuts_end=True)


def test_a_released_text_needs_what_the_release_had(tmp_path: Path) -> None:
    tokenizers = {kind: load_tokenizer(write(tmp_path / kind, FAMILIES[kind]), True) for kind in ("llama", "qwen2")}
    with pytest.raises(ValueError, match="released knows opt and llama, not qwen2"):
        text_form(tokenizers["qwen2"].vocabulary, "qwen2", released=True)
    with pytest.raises(ValueError, match="no token for a line break, by which released texts of OPT end"):
        text_form(tokenizers["llama"].vocabulary, "opt", released=True)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_prompt_that_leaves_no_room_is_refused(tmp_path: Path, kind: str) -> None:
    """Its tokens are counted by the language model's own tokenizer; one that fits is read as it stands."""
    tokenizer = load_tokenizer(write(tmp_path / kind, FAMILIES[kind]), of_language_model=True)
    words = ["--recipe", "evlgen_tiny", "--task.name", "captioning", "--data.max_text_length", "20", "--task.prompt"]
    with pytest.raises(ConfigError, match="task.prompt 'a photo .*leave it no room in data.max_text_length 20"):
        prompt_words(parse_command_line([*words, "a photo of " * 4 + "things"]).config, tokenizer)
    found = prompt_words(parse_command_line([*words, "a photo of"]).config, tokenizer)
    assert tokenizer.decode(found) == "a photo of"


def test_what_stands_for_padding_changes_nothing() -> None:
    """Of texts of different lengths, losses and gradients are the same with any token there."""
    model: Any = small_model("llama").double()
    images = torch.randint(0, 256, (3, 1, 3, 16, 16), dtype=torch.uint8)
    rows = [Row([3, *range(5, 5 + length), 3], number, 0) for number, length in enumerate((1, 4, 9))]
    found = []
    for pad in (0, 3, 22):
        batch = model.planner(images, rows)
        batch.plan.text[batch.plan.number < 0] = pad
        model.zero_grad()
        loss = model(batch)["caption"]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
