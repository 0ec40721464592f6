"""The tokenizer: captions to token ids and back, from a folder or a Hugging Face name."""

from __future__ import annotations

import hashlib
import os
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.config import Vocabulary
from model.torchvision_shim import ensure_torchvision
from pipeline.config.options import Config, reads_by_language_model
from pipeline.data.tokenizer_source import tokenizer_source

_SPECIAL_NAMES = {  # role -> attributes of a Hugging Face tokenizer that may hold it
    "bos": ("bos_token", "cls_token"),
    "pad": ("pad_token",),
    "eos": ("eos_token", "sep_token"),
    "mask": ("mask_token",),
}
# Of a language model: what begins a document (the first of these that there is), and what ends a text.
_DOCUMENT_BEGINS, _OF_LANGUAGE = "<|endoftext|>", {"bos": ("bos_token", "eos_token"), "eos": ("eos_token", "bos_token")}
_HOW_TO_GET_ONE = "`python -m data_prep tokenizer` trains one from prepared captions"
MAX_IDS_PER_TOKEN = 10  # gaps between ids are rare and small
MIN_TEXT_LENGTH = 3  # <s>, one word, </s>


class TextTokenizer:
    """Encodes and decodes captions; holds the fast tokenizer's own engine, so it pickles and needs no network.

    ``special_ids`` maps bos, pad, eos and mask to ids. Words that spell a special token are encoded as plain text.
    """

    def __init__(self, engine: Any, special_ids: dict[str, int], source: str) -> None:
        engine.no_truncation()
        engine.no_padding()
        engine.encode_special_tokens = True
        self._engine, self._special_ids = engine, special_ids
        self.source = source
        tokens = engine.get_vocab(with_added_tokens=True)
        special = {f"{role}_id": number for role, number in special_ids.items()}
        newline = engine.encode("\n", add_special_tokens=False).ids
        self.vocabulary = Vocabulary(
            max(tokens.values()) + 1,
            **special,
            word_starts=_word_starts(tokens),
            newline_id=newline[0] if len(newline) == 1 else -1,
        )
        self._hidden = {*special_ids.values()}

    @property
    def tokens(self) -> dict[str, int]:
        """Id of every token as the vocabulary spells it."""
        return self._engine.get_vocab(with_added_tokens=True)

    @property
    def fingerprint(self) -> str:
        """Changes when any text could get other ids."""
        content = f"{self._engine.to_str()}{sorted(self._special_ids.items())}"
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: str, max_length: int) -> list[int]:
        """``<s> .. </s>``, at most ``max_length`` ids; a long text loses its end, never ``</s>``."""
        if max_length < MIN_TEXT_LENGTH:
            raise ValueError(f"max_text_length {max_length}: expected at least {MIN_TEXT_LENGTH} (<s>, a word, </s>)")
        words = self._engine.encode(text, add_special_tokens=False).ids[: max_length - 2]
        return [self.vocabulary.bos_id, *words, self.vocabulary.eos_id]

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids`` without special tokens and surrounding blanks."""
        words = [number for number in ids if number not in self._hidden]
        return self._engine.decode(words, skip_special_tokens=True).strip()

    def __getstate__(self) -> dict[str, Any]:
        return {"engine": self._engine.to_str(), "special_ids": self._special_ids, "source": self.source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self.__init__(Tokenizer.from_str(state["engine"]), state["special_ids"], state["source"])


def load_tokenizer(source: str | Path, of_language_model: bool = False) -> TextTokenizer:
    """The tokenizer in folder ``source`` (no network is touched), or of that name on the Hugging Face hub.

    A ``Path`` is always a folder, a string may be either. Raises ValueError when there is none, or when it lacks a
    special token that FLM needs; ``of_language_model``: one that EVLGen needs, what begins and what ends a text.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # captions are encoded one by one, in loader processes
    must_be_folder = isinstance(source, Path) or source.startswith(("/", ".", "~")) or Path(source).exists()
    source, is_folder = str(source), Path(source).is_dir()
    if must_be_folder and not is_folder:
        raise ValueError(f"tokenizer {source}: no such folder; {_HOW_TO_GET_ONE}")
    if is_folder and not any((Path(source) / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise ValueError(f"tokenizer {source}: neither tokenizer.json nor a vocabulary in it; {_HOW_TO_GET_ONE}")
    tokenizer = _from_transformers(source, local_only=is_folder)
    engine = getattr(tokenizer, "backend_tokenizer", None)
    if engine is None:
        raise ValueError(f"tokenizer {source}: has no fast version (tokenizer.json); {_HOW_TO_GET_ONE}")
    special_ids = _language_ids(tokenizer, source) if of_language_model else _special_ids(tokenizer, source)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(
            f"tokenizer {source}: knows special tokens only, its vocabulary was not read; {_HOW_TO_GET_ONE}"
        )
    highest = max(engine.get_vocab(with_added_tokens=True).values())
    if highest > MAX_IDS_PER_TOKEN * len(tokenizer):  # tables are made for every id up to it
        raise ValueError(f"tokenizer {source}: numbers {len(tokenizer)} tokens up to {highest}; {_HOW_TO_GET_ONE}")
    with _readable(source, "not readable"):  # tokenizers may write a file that it does not read
        return TextTokenizer(type(engine).from_str(engine.to_str()), special_ids, source)


def tokenizer_of(config: Config, source: str | Path | None = None) -> TextTokenizer:
    """The tokenizer that a run with this ``config`` reads texts by, from ``source`` where that is given; raises as
    :func:`load_tokenizer`."""
    source = tokenizer_source(config) if source is None else source
    if not reads_by_language_model(config):
        return load_tokenizer(source)
    try:
        return load_tokenizer(source, of_language_model=True)
    except ValueError as error:
        wanted = "model.language.name is the folder of a causal LM with its tokenizer, or its Hugging Face name"
        raise ValueError(str(error).replace(_HOW_TO_GET_ONE, wanted)) from error


@contextmanager
def _readable(source: str, otherwise: str) -> Iterator[None]:
    """Around what reads files of others: whatever their libraries raise becomes a ValueError of one line."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # a failed check in Rust
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"tokenizer {source}: {otherwise} ({reason}); {_HOW_TO_GET_ONE}") from error


def _word_starts(tokens: dict[str, int]) -> bytes:
    """One byte per token, 1 where it begins a word: marked by a blank (byte-level BPE, SentencePiece), unmarked
    (WordPiece), or ASCII punctuation. Empty for a tokenizer that marks neither."""
    marks = (("\u0120", True), ("\u2581", True), ("##", False))  # mark, whether it begins a word or continues one
    used = [pair for pair in marks if any(t.startswith(pair[0]) and len(t) > len(pair[0]) for t in tokens)]
    if not used:
        return b""
    mark, begins = used[0]
    starts = bytearray(max(tokens.values()) + 1)
    for token, number in tokens.items():
        marked = token.startswith(mark)
        starts[number] = marked == begins or (not marked and token[:1] in string.punctuation)
    return bytes(starts)


def _from_transformers(source: str, local_only: bool) -> Any:
    ensure_torchvision()  # a folder of a model is asked for its configuration, which imports models
    from transformers import AutoTokenizer

    where = "not readable" if local_only else "neither a folder nor to be had from the Hugging Face hub"
    with _readable(source, where):
        return AutoTokenizer.from_pretrained(source, local_files_only=local_only, trust_remote_code=False)


def _special_ids(tokenizer: Any, source: str) -> dict[str, int]:
    vocabulary, found = tokenizer.get_vocab(), {}
    for role, names in _SPECIAL_NAMES.items():
        tokens = [token for token in (getattr(tokenizer, name, None) for name in names) if token in vocabulary]
        if not tokens:
            raise ValueError(f"tokenizer {source}: has no {' or '.join(names)}, which FLM needs; {_HOW_TO_GET_ONE}")
        found[role] = vocabulary[tokens[0]]
    if len(set(found.values())) < len(found):
        raise ValueError(
            f"tokenizer {source}: special tokens share ids ({found}), FLM needs them apart; {_HOW_TO_GET_ONE}"
        )
    return found


def _language_ids(tokenizer: Any, source: str) -> dict[str, int]:
    """What begins a document, ends a text and pads; no token is hidden from a language model, and few have a pad."""
    vocabulary = tokenizer.get_vocab()
    found = {"mask": -1}
    for role, names in _OF_LANGUAGE.items():
        tokens = [token for token in (getattr(tokenizer, name, None) for name in names) if token in vocabulary]
        if not tokens:
            raise ValueError(
                f"tokenizer {source}: has neither {' nor '.join(names)}, by which a text begins or ends; name those in"
                " its tokenizer_config.json"
            )
        found[role] = vocabulary[tokens[0]]
    found["bos"] = vocabulary.get(_DOCUMENT_BEGINS, found["bos"])
    found["pad"] = vocabulary.get(getattr(tokenizer, "pad_token", None), found["eos"])
    return found


def clean_caption(text: str, full_stop: bool) -> str:
    """``text`` with every run of white space as one blank and none at the ends; "" if no word is left.

    With ``full_stop`` trailing full stops are replaced by exactly one (specification 6.1, the released behaviour).

    # NOTE release: several blanks stay several, and "dog ." becomes "dog ."; here: one blank, and "dog.".
    """
    text = " ".join(text.split())
    if not full_stop:
        return text
    text = text.rstrip(". ")
    return f"{text}." if text else ""
