"""Trains a byte-level BPE tokenizer with RoBERTa's special tokens from the captions of prepared splits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data_prep.checks.info import row_texts
from data_prep.manifest import Manifest, read_manifest, sync_directory
from data_prep.record import PrepError

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as in RoBERTa; <mask> is the last id
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS) + 1
MAX_LENGTH = 512

# A word has the same tokens at every position, the first included: with few captions, two versions of every first
# word would waste vocabulary and split its counts. Decoded text therefore starts with a space.
ADD_PREFIX_SPACE = True


def train_tokenizer(split_dirs: list[Path], output: Path, vocab_size: int, overwrite: bool = False) -> int:
    """Train on the captions of ``split_dirs`` and write a Hugging Face tokenizer folder; returns its number of tokens.

    Few captions may give fewer than ``vocab_size``. Equal captions in equal order give equal files. Raises PrepError.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise PrepError(f"--vocab-size {vocab_size}: bytes and special tokens alone need {MIN_VOCAB_SIZE}")
    if output.exists() and not overwrite:
        raise PrepError(f"{output}: exists already; give --overwrite to replace it, or another --output")
    if output.exists() and not (output / "tokenizer.json").is_file():
        raise PrepError(f"{output}: holds something that is no tokenizer; give another --output")
    tokenizer = _build()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    manifests = {folder: read_manifest(folder) for folder in split_dirs}
    tokenizer.train_from_iterator(_texts(manifests), trainer)
    # As in RoBERTa <mask> takes the space before it, so that "a <mask>" and "a<mask>" are the same tokens.
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False, special=True)])
    sources = {str(folder): manifest.fingerprint() for folder, manifest in manifests.items()}
    _save(tokenizer, output, {"vocab_size": vocab_size, "trained_on": sources})
    return tokenizer.get_vocab_size()


def _texts(manifests: dict[Path, Manifest]) -> Iterator[str]:
    for folder, manifest in manifests.items():
        yield from row_texts(folder, manifest)


def _build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=ADD_PREFIX_SPACE)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=ADD_PREFIX_SPACE
    )
    return tokenizer


def _save(tokenizer: Tokenizer, output: Path, training: dict) -> None:
    """Write the tokenizer into a hidden folder and rename it, so that it is complete or absent."""
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    part.mkdir(parents=True)
    try:
        tokenizer.save(str(part / "tokenizer.json"))
        tokenizer.model.save(str(part))  # vocab.json and merges.txt, for readers of the older format
        config = {
            "tokenizer_class": "RobertaTokenizer",
            "add_prefix_space": ADD_PREFIX_SPACE,
            "trim_offsets": True,
            "model_max_length": MAX_LENGTH,
            "clean_up_tokenization_spaces": False,
            "bos_token": "<s>",
            "cls_token": "<s>",
            "eos_token": "</s>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": {
                "__type": "AddedToken",
                "content": "<mask>",
                "lstrip": True,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            },
        }
        (part / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
        (part / "training.json").write_text(json.dumps(training, indent=1, sort_keys=True) + "\n")
        if output.exists():
            os.rename(output, old)
        os.rename(part, output)
        sync_directory(output.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
