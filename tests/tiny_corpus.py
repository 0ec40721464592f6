"""A small synthetic corpus with its tokenizer, for tests."""

from __future__ import annotations

from pathlib import Path

from data_prep.drawn.synth import SynthOptions, write_corpora
from data_prep.tokenizer import train_tokenizer


def make_corpus(folder: Path, train: int, dev: int, vocabulary_size: int = 400) -> Path:
    """Scenes of 32 px below ``folder``/synth and a tokenizer of their captions in ``folder``/tokenizer; the folder."""
    sizes = {"train": train, "dev": dev, "test": 0}
    write_corpora(folder / "synth", SynthOptions(sizes, image_size=32, pair_share=0))
    train_tokenizer([folder / "synth" / "train"], folder / "tokenizer", vocabulary_size)
    return folder
