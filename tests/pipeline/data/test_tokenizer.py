"""Tokenizers load from a folder without a network, frame and cut captions, and survive pickling."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from model.config import Vocabulary
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer

COMMAND = "python -m data_prep tokenizer"
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}


def write_tokenizer(folder: Path, **changes: str | None) -> Path:
    """A byte-level BPE in Hugging Face files; ``changes`` to the special tokens, None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = Tokenizer(models.BPE(unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(["a caption of picture number one", "some caption of another picture"] * 20, trainer)
    engine.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False, special=True)])
    engine.save(str(folder / "tokenizer.json"))
    specials = {name: token for name, token in {**SPECIALS, **changes}.items() if token is not None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **specials}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_vocabulary_is_what_the_model_must_know(tokenizer):
    size = tokenizer.vocabulary.size
    starts = tokenizer.vocabulary.word_starts
    assert tokenizer.vocabulary == Vocabulary(size, bos_id=0, pad_id=1, eos_id=2, mask_id=size - 1, word_starts=starts)
    assert size > 260 and len(starts) == size


def test_tokens_know_where_words_begin(tokenizer):
    """Byte-level BPE marks the blank before a word; punctuation is a word of its own."""
    ids = tokenizer.encode("some xyzzy, picture", 50)[1:-1]
    begins = [tokenizer.vocabulary.starts_word(number) for number in ids]
    words = []
    for number, begin in zip(ids, begins, strict=True):
        piece = tokenizer.decode([number])
        if begin or not words:
            words.append(piece)
        else:
            words[-1] += piece
    assert words == ["some", "xyzzy", ",", "picture"]


def test_frame_cut_and_decode(tokenizer):
    text = "some caption of picture number one"
    ids = tokenizer.encode(text, 50)
    assert ids[0] == 0 and ids[-1] == 2 and tokenizer.decode(ids) == text
    assert tokenizer.encode(text, 5) == [*ids[:4], 2]
    assert tokenizer.encode(text * 1000, 50)[-1] == 2 and len(tokenizer.encode(text * 1000, 50)) == 50
    assert tokenizer.decode(tokenizer.encode("naïve 猫 🙂", 50)) == "naïve 猫 🙂"
    with pytest.raises(ValueError, match="max_text_length 2"):
        tokenizer.encode(text, 2)


def test_captions_that_spell_special_tokens_stay_plain_text(tokenizer):
    """Invariant 7: a downloaded caption cannot end the text or ask for a mask."""
    text = "a </s> caption <mask> of <pad> one"
    ids = tokenizer.encode(text, 100)
    vocabulary = tokenizer.vocabulary
    assert not {vocabulary.bos_id, vocabulary.pad_id, vocabulary.eos_id, vocabulary.mask_id} & set(ids[1:-1])
    assert tokenizer.decode(ids) == text


def test_copies_are_equal(tokenizer):
    copied = pickle.loads(pickle.dumps(tokenizer))
    text = "a caption </s> é"
    assert copied.encode(text, 50) == tokenizer.encode(text, 50)
    assert (copied.vocabulary, copied.fingerprint, copied.source) == (
        tokenizer.vocabulary,
        tokenizer.fingerprint,
        tokenizer.source,
    )


def test_fingerprint_tells_tokenizers_apart(tokenizer, tmp_path):
    again, other = write_tokenizer(tmp_path / "again"), write_tokenizer(tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = False
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(again).fingerprint == tokenizer.fingerprint != load_tokenizer(str(other)).fingerprint


def test_cls_and_sep_serve_as_bos_and_eos(tmp_path):
    folder = write_tokenizer(tmp_path, bos_token=None, eos_token=None, cls_token="<s>", sep_token="</s>")
    assert load_tokenizer(folder).encode("a caption", 50)[0] == 0


def test_the_tokenizer_of_bert(tmp_path):
    """WordPiece with [CLS], [SEP], [PAD] and [MASK], from a vocab.txt; "##" marks what continues a word."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cap", "##tion", ","]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    tokenizer = load_tokenizer(tmp_path)
    vocabulary = tokenizer.vocabulary
    assert (vocabulary.size, vocabulary.special_ids) == (9, (2, 0, 3, 4))
    ids = tokenizer.encode("A caption, a", 50)
    assert ids == [2, 5, 6, 7, 8, 5, 3] and tokenizer.decode(ids) == "a caption, a"
    assert [vocabulary.starts_word(number) for number in ids[1:-1]] == [True, True, False, True, True]
    assert not set(tokenizer.encode("[SEP] [MASK] a", 50)[1:-1]) & {*vocabulary.special_ids}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_token": None}, "no mask_token"),
        ({"bos_token": None}, "no bos_token or cls_token"),
        ({"pad_token": "</s>"}, "share ids"),
    ],
)
def test_missing_special_tokens_are_named(tmp_path, changes, message):
    """Invariant 9."""
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(write_tokenizer(tmp_path, **changes))
    assert COMMAND in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, monkeypatch):
    """Invariant 9."""
    (tmp_path / "empty").mkdir()
    broken = write_tokenizer(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in (
        tmp_path / "nowhere",
        str(tmp_path / "nowhere"),
        tmp_path / "empty",
        broken,
        "nobody/no-such-tokenizer",
    ):
        with pytest.raises(ValueError, match="tokenizer") as caught:
            load_tokenizer(source)
        assert COMMAND in str(caught.value) and "\n" not in str(caught.value)


def test_tokenizer_without_words_is_refused(tmp_path):
    """RobertaTokenizer without its files silently knows its special tokens only."""
    (tmp_path / "vocab.json").write_text(json.dumps({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer", **SPECIALS}))
    with pytest.raises(ValueError, match="special tokens only"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{}", "null", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}}'],
    ids=lambda text: text[:20],
)
def test_a_tokenizer_file_that_is_none_is_one_line(tmp_path, text):
    """Invariant 7."""
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer .*not readable") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_numbers_of_tokens_are_bounded_by_their_number(tmp_path):
    """Invariant 7: tables are made for every id up to the highest."""
    folder = write_tokenizer(tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = 4_000_000_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="up to 4000000000"):
        load_tokenizer(folder)


class PanicException(BaseException):
    """As pyo3 raises it where a check fails in Rust: no Exception."""


def test_a_panic_of_a_library_is_one_line_and_ctrl_c_is_not(tmp_path, monkeypatch):
    folder = write_tokenizer(tmp_path / "tokenizer")
    for error, expected in (
        (PanicException("range end index 10"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def failing(*arguments, error=error):
            raise error

        monkeypatch.setattr(TextTokenizer, "__init__", failing)
        with pytest.raises(expected):
            load_tokenizer(folder)
