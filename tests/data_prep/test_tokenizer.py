"""The tokenizer folder: RoBERTa's special tokens, loadable by transformers, the same on every run."""

import hashlib
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data_prep.__main__ import main
from data_prep.drawn.synth import SynthOptions, write_corpora
from data_prep.record import PrepError, Record
from data_prep.shard_writer import SplitWriter
from data_prep.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_corpora(folder / "synth", SynthOptions({"train": 200, "dev": 5}))
    assert main(["tokenizer", "--data", str(folder), "--output", str(folder / "tokenizer")]) == 0
    return folder


def test_transformers_loads_it_with_robertas_special_tokens(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    assert tokenizer.is_fast and "Roberta" in type(tokenizer).__name__
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    assert (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id) == (2, 2, 3)
    ids = tokenizer("a large red circle")["input_ids"]
    assert ids[0] == 0 and ids[-1] == 2 and len(ids) == 6
    pair = tokenizer("a", "b")["input_ids"]
    assert pair.count(2) == 3  # <s> a </s></s> b </s>


def test_any_text_survives_and_words_do_not_depend_on_their_place(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    for text in ("a red circle", "naïve 日本 \N{DOG FACE}", "Tab\tand  spaces"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" ") == text
    assert tokenizer("red")["input_ids"][1] == tokenizer("a red")["input_ids"][2]


def test_equal_data_gives_equal_files_and_only_train_is_used(root):
    train_tokenizer([root / "synth" / "train"], root / "again", 8192)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        first, second = ((root / folder / name).read_bytes() for folder in ("tokenizer", "again"))
        assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest(), name
    assert "synth/train" in (root / "tokenizer" / "training.json").read_text()
    assert "synth/dev" not in (root / "tokenizer" / "training.json").read_text()


def test_sizes_and_existing_folders(root, capsys):
    assert train_tokenizer([root / "synth" / "train"], root / "small", 270) == 270
    with pytest.raises(PrepError, match="261"):
        train_tokenizer([root / "synth" / "train"], root / "tiny", 100)
    assert main(["tokenizer", "--data", str(root), "--output", str(root / "tokenizer")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    with pytest.raises(PrepError, match="no tokenizer"):
        train_tokenizer([root / "synth" / "train"], root / "synth", 300, overwrite=True)
    assert main(["tokenizer", "--data", str(root / "nothing")]) == 2
    assert "python -m data_prep synth" in capsys.readouterr().err


def test_texts_about_image_pairs_are_read_where_there_are_no_others(tmp_path: Path) -> None:
    record = Record("p", (b"a", b"b"), ("both show a red kite", "the left one flies"), {}, ("jpg", "jpg"))
    with SplitWriter(tmp_path / "pairs" / "train", "pairs", "train", num_images=2) as writer:
        writer.add(record)
    command = ["tokenizer", "--data", str(tmp_path / "pairs"), "--output", str(tmp_path / "tokenizer")]
    assert main([*command, "--vocab-size", "300"]) == 0 and (tmp_path / "tokenizer" / "tokenizer.json").is_file()
